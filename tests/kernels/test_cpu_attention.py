"""Attention in C++: against the definition, and bit for bit against itself cut, crowded, permuted, on more threads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cpu_attention_steps import Cache, attention_shape, head_norm, in_steps, random_qkv, step, tables

from moestro.kernels.cpu.attention import make_cpu_attention
from moestro.kernels.cpu.build import unavailable_reason
from moestro.kernels.paged_attention import paged_attention_reference
from moestro.kernels.plain import PlainBackend
from moestro.kernels.rms_norm import rms_norm_reference
from moestro.kernels.rotary import rotate

REASON = unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

WIDTHS = [16, 24, 64, 80, 96, 128, 192, 256]
BORDERS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513]


def make(shape, norm=None):
    return make_cpu_attention(shape, norm)


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_definition(shape, norm, spans, block_size, seed):
    """``spans`` are (tokens in the cache before, new tokens)."""
    attention = make(shape, norm)
    spans = sorted(spans, key=lambda span: span[1] > 1)
    blocks = sum(-(-(before + new) // block_size) for before, new in spans)
    cache = Cache(shape, blocks, block_size, seed)
    qkv = [random_qkv(shape, before + new, seed + s) for s, (before, new) in enumerate(spans)]
    for s, (before, _) in enumerate(spans):
        if before:
            step(attention, cache, [(s, qkv[s], 0, before)])
    before_NCbD = cache.kv_NCbD.clone()
    done = step(attention, cache, [(s, qkv[s], before, before + new) for s, (before, new) in enumerate(spans)])
    check_cache(shape, norm, spans, qkv, before_NCbD, cache, done)
    where = (done.spans.query_start_S1, done.spans.context_len_S, done.spans.block_table_SB)
    want = paged_attention_reference(done.q_TQD.double(), cache.kv_NCbD, *where, shape.window, shape.scale)
    assert done.out_TQD.shape == done.q_TQD.shape
    torch.testing.assert_close(done.out_TQD.double(), want, rtol=2**-8, atol=2e-6, msg=lambda m: f"seed {seed}: {m}")


def check_cache(shape, norm, spans, qkv, before_NCbD, cache, done):
    """Queries, keys and values are rounded once; the rest of a block that was begun is empty, all others untouched."""
    num_heads, num_turned = shape.num_heads, shape.num_heads + shape.num_kv_heads
    new_TND = torch.cat([qkv[s][before:] for s, (before, _) in enumerate(spans)]).double()
    positions = [p for before, new in spans for p in range(before, before + new)]
    turned_TND = new_TND[:, :num_turned]
    if norm is not None:
        turned_TND = rms_norm_reference(turned_TND, None, norm.eps) * norm.weight_ND.double()
    cos, sin = (table.double() for table in tables(shape, positions))
    rotated = rotate(turned_TND[..., : shape.rotary_dim], cos, sin) if shape.rotary_dim else turned_TND[..., :0]
    turned_TND = torch.cat((rotated, turned_TND[..., shape.rotary_dim :]), -1)
    torch.testing.assert_close(done.q_TQD.double(), turned_TND[:, :num_heads], rtol=2**-8, atol=1e-6)
    flat, flat_before = (kv.transpose(1, 2).flatten(0, 1) for kv in (cache.kv_NCbD, before_NCbD))
    slot_T = done.spans.slot_T
    torch.testing.assert_close(
        flat[slot_T, : shape.num_kv_heads].double(), turned_TND[:, num_heads:], rtol=2**-8, atol=1e-6
    )
    assert torch.equal(flat[slot_T, shape.num_kv_heads :].double(), new_TND[:, num_turned:])
    others = torch.ones(len(flat), dtype=torch.bool)
    others[slot_T] = False
    begun = {slot // cache.block_size for slot in slot_T.tolist() if slot % cache.block_size == 0}
    is_begun = torch.tensor([slot // cache.block_size in begun for slot in range(len(flat))])
    assert not flat[others & is_begun].any()
    assert torch.equal(flat[others & ~is_begun].view(torch.int16), flat_before[others & ~is_begun].view(torch.int16))


@pytest.mark.parametrize("window", [None, 1, 5, 16, 100, 1000])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4), (8, 1), (14, 2)])
def test_decodes_prompts_and_chunks_together(window, heads):
    shape = attention_shape(*heads, 16, window=window)
    spans = [(0, 1), (200, 1), (3, 1), (31, 1), (0, 12), (20, 7), (0, 33), (64, 2), (0, 100)]
    check_definition(shape, None, spans, 8, seed=7)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normed", [False, True])
def test_widths_norms_and_partial_rotation(width, normed):
    for rotary_dim in (0, width // 2 // 2 * 2, width):
        shape = attention_shape(4, 2, width, rotary_dim=rotary_dim, scale=width**-0.5)
        norm = head_norm(shape, width) if normed else None
        check_definition(shape, norm, [(70, 1), (0, 1), (0, 67)], 16, seed=width)


@settings(max_examples=30, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 70))), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (7, 1)]),
    width=st.sampled_from([2, 16, 24, 34, 64]),
    block_size=st.sampled_from([1, 2, 4, 16, 24]),
    window=st.one_of(st.none(), st.integers(1, 90)),
    seed=st.integers(0, 1000),
)
def test_any_mix(spans, heads, width, block_size, window, seed):
    check_definition(attention_shape(*heads, width, window=window), None, spans, block_size, seed)


@pytest.mark.parametrize("context", [4096, 5000])
def test_long_contexts(context):
    for window in (None, 700):
        shape = attention_shape(4, 2, 64, window=window, scale=0.125)
        check_definition(shape, None, [(context - 1, 1), (context - 3, 3)], 16, seed=context)


def test_no_tokens():
    shape = attention_shape(4, 2, 64)
    done = step(make(shape), Cache(shape, 1, 16, seed=0), [])
    assert done.out_TQD.shape == (0, 4, 64)


def test_error_is_that_of_rounding_the_result():
    """Half of what a product with probabilities in bf16 would add."""
    shape = attention_shape(8, 2, 64, scale=0.125)
    cache = Cache(shape, 200, 16, seed=1)
    done = step(make(shape), cache, [(0, random_qkv(shape, 200, 5), 0, 200)])
    where = (done.spans.query_start_S1, done.spans.context_len_S, done.spans.block_table_SB)
    want = paged_attention_reference(done.q_TQD.double(), cache.kv_NCbD, *where, None, shape.scale)
    assert relative_error(done.out_TQD, want) < 1.05 * relative_error(want.bfloat16(), want)


def test_agrees_with_the_plain_backend():
    shape = attention_shape(8, 2, 64, window=90, scale=0.125)
    qkv_LND, norm = random_qkv(shape, 300, 3), head_norm(shape, 3)
    outs = [
        in_steps(attention, Cache(shape, 30, 16, seed=1, left_behind=0.0), 0, qkv_LND, [100, 101, 250])
        for attention in (make(shape, norm), PlainBackend().make_attention(shape, norm))
    ]
    assert relative_error(*outs) < 2**-7


def check_invariance(shape, length, block_sizes, cuts, seed, threads=(1, 2)):
    """One sequence whole; then cut, with other blocks of other sizes, beside others, on one thread and on two."""
    attention, qkv_LND = make(shape), random_qkv(shape, length, seed)
    others = [random_qkv(shape, length, seed + 1 + i) for i in range(3)]
    torch.set_num_threads(1)
    whole = in_steps(attention, Cache(shape, length, block_sizes[0], seed), 0, qkv_LND, []).view(torch.int16)
    assert not (whole == 0x7FC0).any()
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        for block_size in block_sizes:
            alone = in_steps(attention, Cache(shape, length, block_size, seed + 1), 0, qkv_LND, cuts)
            assert torch.equal(alone.view(torch.int16), whole), ("alone", num_threads, block_size, seed)
            cache = Cache(shape, 4 * length, block_size, seed + 2)
            for i, other_LND in enumerate(others):
                step(attention, cache, [(1 + i, other_LND, 0, length - 1)])
            bounds = [0, *cuts, length]
            for start, stop in pairwise(bounds):
                pieces = [
                    (0, qkv_LND, start, stop),
                    (1, others[0], length - 1, length),
                    (2, others[1], 0, min(9, length)),
                ]
                pieces.sort(key=lambda piece: piece[3] - piece[2] > 1)
                done = step(attention, cache, pieces)
                at = done.spans.query_start_S1[[piece[0] for piece in pieces].index(0)]
                crowd = done.out_TQD[at : at + stop - start].view(torch.int16)
                assert torch.equal(crowd, whole[start:stop]), ("crowd", start, stop, num_threads, block_size, seed)
    torch.set_num_threads(1)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_query_does_not_depend_on_cuts_company_blocks_or_threads(heads, width):
    window = 100 if heads == (4, 2) else None
    shape = attention_shape(*heads, width, window=window)
    check_invariance(shape, 200, [16, 24], [1, 7, 64, 65, 129, 199], seed=width)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(12, 300),
    width=st.sampled_from([16, 24, 64]),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (4, 4), (8, 1)]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    block_size=st.sampled_from([1, 4, 16, 24]),
    cuts=st.lists(st.integers(1, 11), min_size=0, max_size=3, unique=True).map(sorted),
    seed=st.integers(0, 1000),
)
def test_any_cut_of_any_sequence(length, width, heads, window, block_size, cuts, seed):
    check_invariance(attention_shape(*heads, width, window=window), length, [block_size], cuts, seed)


@pytest.mark.parametrize("window", [None, 600])
def test_a_long_context_dealt_out_to_threads(window):
    """Alone its segments are computed by several threads, in company by one."""
    shape = attention_shape(4, 2, 64, window=window)
    check_invariance(shape, 2100, [16], [2048, 2099], seed=9, threads=(1, 2, 3))


@pytest.mark.parametrize("position", BORDERS)
def test_token_by_token_around_the_borders_of_chunks_and_segments(position):
    shape = attention_shape(4, 2, 64)
    cuts = [p for p in range(position - 1, position + 3) if 0 < p < 600]
    check_invariance(shape, 600, [16], cuts, seed=position, threads=(2,))


def test_what_a_query_does_not_see_is_not_read():
    """Not even to be multiplied by zero: slots not yet written, other sequences' blocks, keys behind the window, and
    later tokens of the same chunk may hold NaN."""
    shape = attention_shape(4, 2, 64, window=40)
    attention, qkv_LND = make(shape), random_qkv(shape, 200, 4)
    want = in_steps(attention, Cache(shape, 13, 16, seed=2), 0, qkv_LND, [])
    for poisoned in (0, 63, 64, 130, 199):
        bad_LND = qkv_LND.clone()
        bad_LND[poisoned] = float("nan")
        for cuts in ([], [64], [120, 121, 122], [190, 199]):
            got = in_steps(attention, Cache(shape, 13, 16, seed=3), 0, bad_LND, cuts)
            sees = torch.zeros(200, dtype=torch.bool)
            sees[poisoned : poisoned + 40] = True
            assert torch.equal(got[~sees], want[~sees]), (poisoned, cuts)
            assert got[sees].isnan().all(), (poisoned, cuts)


def test_a_row_of_the_table_behind_a_window_may_be_block_zero():
    """The cache drops blocks that no query will see again; their entries are 0."""
    shape = attention_shape(4, 2, 64, window=20)
    attention, qkv_LND = make(shape), random_qkv(shape, 100, 4)
    cache = Cache(shape, 7, 16, seed=2)
    step(attention, cache, [(0, qkv_LND, 0, 99)])
    kept = cache.kv_NCbD.clone()
    want = step(attention, cache, [(0, qkv_LND, 99, 100)]).out_TQD
    cache.kv_NCbD.copy_(kept)
    cache.table(0, 100)[:4] = [0] * 4
    assert torch.equal(step(attention, cache, [(0, qkv_LND, 99, 100)]).out_TQD, want)
