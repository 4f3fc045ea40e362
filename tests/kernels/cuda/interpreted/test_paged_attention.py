"""The kernel for decodes and prompts against the definition, and its promise: a query's bits depend on nothing else.

Most of it with smaller tiles than the chip's, since the interpreter takes milliseconds for every operation of a tile.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cuda.interpreted.attention_cases import (
    make_shape,
    make_spans,
    random_case,
    random_norm,
    reference,
)

from moestro.kernels.backend import Decodes
from moestro.kernels.cuda.attention import CudaAttention, make_attention
from moestro.kernels.cuda.attention_plan import Work, make_plan, plan_decodes
from moestro.kernels.cuda.attention_tile import AttentionTile, attention_tile, choose_splits
from moestro.kernels.cuda.paged_attention import attend_
from moestro.kernels.plain import PlainBackend
from moestro.kernels.rotary import rotary_tables

SCALE = 0.2
SMALL = AttentionTile(keys=16, segment=32, warps=4, stages=2)


def attend(case, pieces, window=None, splits=None, sinks_Q=None, tile=SMALL):
    """Each piece's results, in the order asked for. ``splits``: None as chosen, 1, or more for one for each segment."""
    spans, q_TQD, ordered = make_spans(case, pieces)
    plan = CudaAttention(make_shape(case, window, SCALE), None, tile).plan(spans)
    out_TQD = torch.full_like(q_TQD, float("nan"))
    for work in plan.works:
        num_splits = None if splits is None else 1 if splits == 1 else work.segments + 1
        attend_(
            out_TQD, q_TQD, case.kv_NCbD, plan.block_table_SB, work, tile,
            window=window, scale=SCALE, sinks_Q=sinks_Q, num_splits=num_splits,
        )  # fmt: skip
    rows = dict(zip(ordered, out_TQD.split([stop - first for _, first, stop in ordered]), strict=True))
    return [rows[piece] for piece in pieces]


def check_against_reference(case, pieces, window, splits, sinks_Q=None, tile=SMALL):
    for piece, out in zip(pieces, attend(case, pieces, window, splits, sinks_Q, tile), strict=True):
        spans, q_TQD, _ = make_spans(case, [piece])
        want = reference(spans, q_TQD, case.kv_NCbD, window, SCALE, sinks_Q)
        error = (out.double() - want).norm() / want.norm()
        assert error < 4e-3, (piece, window, splits, float(error))


@pytest.mark.parametrize(
    ("width", "num_kv_heads", "group", "window"),
    [(64, 2, 4, None), (80, 1, 1, 20), (96, 2, 3, None), (128, 1, 8, None), (192, 1, 2, 33), (256, 1, 2, None)],
)
def test_is_the_definition(width, num_kv_heads, group, window):
    case = random_case(width, 3, 41, width, num_kv_heads, group, 16)
    pieces = [(0, 40, 41), (1, 0, 1), (2, 30, 34), (0, 14, 19)]
    for splits in (1, 2):
        check_against_reference(case, pieces, window, splits)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_is_the_definition_with_the_tiles_of_the_chip(width):
    tile = attention_tile(width)
    case = random_case(width, 1, tile.segment + 3, width, 1, 8, 16)
    for splits in (1, 2):
        check_against_reference(case, [(0, tile.segment + 2, tile.segment + 3)], None, splits, tile=tile)


@pytest.mark.parametrize("window", [None, 1, 40])
def test_sinks_join_the_sum(window):
    case = random_case(3, 1, 100, 32, 1, 4, 16)
    sinks_Q = torch.tensor([0.5, -1.0, 30.0, float("-inf")])
    for splits in (1, 2):
        check_against_reference(case, [(0, 99, 100), (0, 43, 52)], window, splits, sinks_Q)


def test_no_worse_than_fused_attention_of_torch():
    case = random_case(5, 1, 192, 64, 1, 1, 16)
    spans, q_TQD, _ = make_spans(case, [(0, 0, 192)])
    got = attend(case, [(0, 0, 192)], tile=attention_tile(64))[0].double()
    at_L = torch.arange(192)
    k_LD, v_LD = (case.kv_NCbD[case.table_SB[0].long()[at_L // 16], slab, at_L % 16] for slab in (0, 1))
    want = reference(spans, q_TQD, case.kv_NCbD, None, SCALE)
    fused_11LD = torch.nn.functional.scaled_dot_product_attention(
        q_TQD.transpose(0, 1)[None], k_LD[None, None], v_LD[None, None], is_causal=True, scale=SCALE
    )
    assert (got - want).norm() <= 1.01 * (fused_11LD[0].transpose(0, 1).double() - want).norm()


def check_bits(case, length, cuts, window, positions, sinks_Q=None):
    """Sequence 0 whole, cut, token by token, in company, with keys split and not: all the same."""
    whole = attend(case, [(0, 0, length)], window, 1, sinks_Q)[0]
    pieces = [(0, first, stop) for first, stop in zip([0, *cuts], [*cuts, length], strict=True)]
    for (_, first, stop), got in zip(pieces, attend(case, pieces, window, 2, sinks_Q), strict=True):
        assert torch.equal(got, whole[first:stop]), (first, stop)
    last = positions[-1]
    for splits in (1, 2):
        alone = attend(case, [(0, last, last + 1)], window, splits, sinks_Q)[0]
        assert torch.equal(alone, whole[last : last + 1]), splits
    others = [(1, length - 1, length), (1, 3, 4), (1, 2, 9)]
    for splits in (1, 2):
        crowd = attend(case, [*others, *((0, p, p + 1) for p in positions)], window, splits, sinks_Q)[len(others) :]
        for position, got in zip(positions, crowd, strict=True):
            assert torch.equal(got, whole[position : position + 1]), ("crowd", position, splits)


@pytest.mark.parametrize(
    ("width", "group", "window"), [(64, 2, 20), (128, 8, None), (32, 3, 17), (256, 1, None), (80, 2, None)]
)
def test_bits_depend_on_the_sequence_and_the_position_alone(width, group, window):
    length = 39
    case = random_case(width + group, 2, length, width, 1, group, 16)
    sinks_Q = torch.linspace(-1, 1, group) if group == 8 else None
    check_bits(case, length, [7, 31, 35], window, [0, 15, 16, 31, 32, 38], sinks_Q)


@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(20, 70),
    heads=st.sampled_from([(1, 1), (1, 5), (2, 4)]),
    window=st.one_of(st.none(), st.integers(1, 60)),
    block_size=st.sampled_from([1, 8, 24, 32]),
    cut=st.integers(1, 19),
    seed=st.integers(0, 1000),
)
def test_any_cut_of_any_sequence(length, heads, window, block_size, cut, seed):
    case = random_case(seed, 2, length, 24, *heads, block_size)
    check_bits(case, length, [cut], window, [length // 2, length - 1])


def test_long_context():
    case = random_case(9, 1, 4000, 16, 1, 2, 16)
    tile = AttentionTile(keys=64, segment=256, warps=4, stages=2)
    whole = attend(case, [(0, 3995, 4000)], None, 1, tile=tile)[0]
    assert torch.equal(attend(case, [(0, 3999, 4000)], None, 2, tile=tile)[0], whole[4:])
    check_against_reference(case, [(0, 3999, 4000)], 700, 2, tile=tile)


def test_what_stands_behind_the_last_token_is_not_read():
    case = random_case(4, 1, 20, 64, 1, 2, 8, columns=6)
    before = attend(case, [(0, 19, 20), (0, 10, 20)])
    live = case.table_SB[0, :3].long()
    dead = torch.ones(len(case.kv_NCbD), dtype=torch.bool)
    dead[live] = False
    case.kv_NCbD[dead] = float("nan")
    case.kv_NCbD[live[2], :, 4:] = float("nan")
    for old, new in zip(before, attend(case, [(0, 19, 20), (0, 10, 20)]), strict=True):
        assert torch.equal(old, new)


def test_what_is_not_a_number_stays_so_and_harms_nobody_else():
    case = random_case(6, 2, 40, 64, 1, 2, 8)
    before = attend(case, [(1, 39, 40)])[0]
    case.q_SLQD[0, 39, 0, 3] = float("nan")
    sick, well = attend(case, [(0, 39, 40), (1, 39, 40)])
    assert sick[0, 0].isnan().all()
    assert sick[0, 1].isfinite().all()
    assert torch.equal(well, before)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("splits", [None, 1])
def test_a_captured_step(window, splits):
    """Planned from tensors alone, with stale blocks behind a context, and a row that is padding."""
    case = random_case(8, 3, 72, 32, 1, 4, 8)
    context_len_S = torch.tensor([72, 0, 7, 49], dtype=torch.int32)
    table_SB = case.table_SB[[0, 1, 1, 2]].clone()
    table_SB[2, 1:] = 10**6
    decodes = Decodes(context_len_S, table_SB, torch.tensor([1, -1, 2, 3]), 8)
    plan = plan_decodes(decodes, segment=SMALL.segment, window=window)
    (work,) = plan.works
    padding_QD = torch.full_like(case.q_SLQD[0, 0], float("nan"))
    q_TQD = torch.stack([case.q_SLQD[0, 71], padding_QD, case.q_SLQD[1, 6], case.q_SLQD[2, 48]])
    out_TQD = torch.full_like(q_TQD, float("nan"))
    attend_(out_TQD, q_TQD, case.kv_NCbD, table_SB, work, SMALL, window=window, scale=SCALE, num_splits=splits)
    want = attend(case, [(0, 71, 72), (1, 6, 7), (2, 48, 49)], window)
    assert torch.equal(out_TQD[[0, 2, 3]], torch.cat(want))
    assert not out_TQD[1].any()


def test_a_captured_step_has_room_for_every_segment_of_a_window():
    table_SB = torch.zeros(1, 100, dtype=torch.int32)
    for window in range(1, 40):
        decodes = Decodes(torch.ones(1, dtype=torch.int32), table_SB, torch.zeros(1, dtype=torch.int64), 8)
        room = plan_decodes(decodes, segment=12, window=window).works[0].segments
        seen = [last // 12 - max(0, last - window + 1) // 12 + 1 for last in range(800)]
        assert room == max(seen), window


def test_an_empty_step():
    case = random_case(1, 1, 8, 64, 1, 2, 8)
    spans, _, _ = make_spans(case, [(0, 0, 1)])
    empty = type(spans)([0], [], 0, spans.block_table_SB[:0], spans.slot_T[:0], 8)
    assert make_plan(empty, queries=8, segment=512, window=None).works == ()


def test_shapes_that_are_not_computed_are_refused():
    case = random_case(1, 1, 4, 264, 1, 1, 8)
    with pytest.raises(ValueError, match="head_dim"):
        make_attention(make_shape(case, None, 1.0), None)
    case = random_case(1, 1, 4, 16, 1, 65, 8)
    with pytest.raises(ValueError, match="query heads"):
        make_attention(make_shape(case, None, 1.0), None)


def test_splits():
    assert choose_splits(1, 4, 128, 4096) == 128
    assert choose_splits(132, 4, 128, 4096) == 1, "enough programs without"
    assert choose_splits(100, 4, 512, 4096) == 1, "a workspace beyond bounds"


def test_fewer_splits_than_segments_are_refused():
    case = random_case(1, 1, 8, 16, 1, 1, 8)
    work = Work(torch.tensor([[0], [0], [1], [7]], dtype=torch.int32), 1, 3)
    q_TQD = case.q_SLQD[0, 7:]
    with pytest.raises(AssertionError):
        attend_(q_TQD.clone(), q_TQD, case.kv_NCbD, case.table_SB, work, SMALL, window=None, scale=1.0, num_splits=2)


def test_an_e4m3_cache():
    """As exact as its content, and the same bits however the keys are split."""
    case = random_case(12, 1, 80, 64, 2, 4, 16, dtype=torch.float8_e4m3fn)
    scale_C = torch.tensor([0.5, 0.25, 2.0, 0.125])
    spans, q_TQD, _ = make_spans(case, [(0, 79, 80), (0, 40, 47)])
    attention = CudaAttention(make_shape(case, None, SCALE), None, SMALL, None, scale_C)
    plan = attention.plan(spans)
    got = []
    for splits in (None, 1):
        out_TQD = torch.empty_like(q_TQD)
        for work in plan.works:
            attend_(
                out_TQD, q_TQD, case.kv_NCbD, plan.block_table_SB, work, SMALL,
                window=None, scale=SCALE, kv_scale_C=scale_C, num_splits=splits,
            )  # fmt: skip
        got.append(out_TQD)
    assert torch.equal(*got)
    kv_NCbD = case.kv_NCbD.float() * scale_C[:, None, None]
    want = reference(spans, q_TQD, kv_NCbD, None, SCALE)
    assert (got[0].double() - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_a_layer_is_the_plain_one(rotary_dim):
    """Norm, rotation, cache and product, step after step."""
    case = random_case(13, 2, 40, 32, 1, 4, 8)
    shape = make_shape(case, None, SCALE, rotary_dim)
    norm = random_norm(shape, 14)
    plain, cuda = PlainBackend().make_attention(shape, norm), CudaAttention(shape, norm, SMALL)
    caches = [case.kv_NCbD.clone(), case.kv_NCbD.clone()]
    generator = torch.Generator().manual_seed(15)
    for pieces in ([(0, 0, 30), (1, 0, 9)], [(0, 30, 31), (1, 9, 20)], [(0, 31, 32), (1, 20, 21)]):
        spans, q_TQD, _ = make_spans(case, pieces)
        qkv_TND = torch.randn(len(q_TQD), 6, 32, generator=generator).bfloat16()
        cos_T1D, sin_T1D = rotary_tables(6 * torch.rand(len(q_TQD), rotary_dim // 2, generator=generator), 1.0)
        outs = [
            attention.apply(qkv_TND.clone(), cos_T1D, sin_T1D, kv_NCbD, attention.plan(spans))
            for attention, kv_NCbD in zip((plain, cuda), caches, strict=True)
        ]
        torch.testing.assert_close(outs[1], outs[0], rtol=2**-5, atol=2**-5)
        torch.testing.assert_close(caches[1], caches[0], rtol=2**-6, atol=2**-6)
