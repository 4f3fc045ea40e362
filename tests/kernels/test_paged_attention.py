"""Paged attention against the definition, over random tables, lengths, windows and shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.attention_tiles import attention_tiles
from moestro.kernels.paged_attention import paged_attention, paged_attention_reference, plan_attention, write_kv_

WIDTH = 16


def check(spans, block_size, num_kv_heads, group, window, dtype, device, seed):
    """``spans`` are (tokens in the cache before, new tokens); single tokens come first."""
    generator = torch.Generator().manual_seed(seed)
    spans = sorted(spans, key=lambda span: span[1] > 1)
    starts = [0]
    for _, new in spans:
        starts.append(starts[-1] + new)
    contexts = [before + new for before, new in spans]
    columns = -(-max(contexts) // block_size) + 1
    num_blocks = 1 + columns * len(spans)
    table_SB = torch.zeros(len(spans), columns, dtype=torch.int32)
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    for s, length in enumerate(contexts):
        for column in range(-(-length // block_size)):
            table_SB[s, column] = free.pop()
    slots = [
        int(table_SB[s, p // block_size]) * block_size + p % block_size
        for s, (before, new) in enumerate(spans)
        for p in range(before, before + new)
    ]
    kv_NCbD = torch.randn(num_blocks, 2 * num_kv_heads, block_size, WIDTH, generator=generator).to(device, dtype)
    q_TQD = torch.randn(starts[-1], num_kv_heads * group, WIDTH, generator=generator).to(device, dtype)
    kv_TCD = torch.randn(starts[-1], 2 * num_kv_heads, WIDTH, generator=generator).to(device, dtype)
    table_SB, slot_T = table_SB.to(device), torch.tensor(slots, device=device)
    plan = plan_attention(
        starts,
        contexts,
        sum(new == 1 for _, new in spans),
        table_SB,
        slot_T,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        window=window,
        tiles=attention_tiles(WIDTH, group, device),
    )
    untouched = kv_NCbD.clone()
    write_kv_(kv_NCbD, kv_TCD, plan)
    flat, flat_before = (kv.transpose(1, 2).reshape(-1, 2 * num_kv_heads, WIDTH) for kv in (kv_NCbD, untouched))
    assert torch.equal(flat[slot_T], kv_TCD)
    others = torch.ones(len(flat), dtype=torch.bool, device=device)
    others[slot_T] = False
    # The rest of a block that is begun here is emptied, every other slot is left alone.
    begun = {slot // block_size for slot in slots if slot % block_size == 0}
    is_begun = torch.tensor([slot // block_size in begun for slot in range(len(flat))], device=device)
    assert not flat[others & is_begun].any()
    assert torch.equal(flat[others & ~is_begun], flat_before[others & ~is_begun])
    got = paged_attention(q_TQD, kv_NCbD, plan, 0.3)
    want = paged_attention_reference(q_TQD, kv_NCbD, starts, contexts, table_SB, window, 0.3)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("window", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (4, 1)])
def test_decodes_prompts_and_chunks_together(device, dtype, window, heads):
    spans = [(0, 1), (200, 1), (3, 1), (31, 1), (0, 12), (20, 7), (0, 33), (64, 2)]
    check(spans, 8, *heads, window, dtype, device, seed=7)


@pytest.mark.parametrize("spans", [[(40, 1)], [(0, 20)], [(13, 5)], [(16, 1), (16, 1)], [(15, 1), (16, 1)]])
@pytest.mark.parametrize("window", [None, 6])
def test_a_batch_of_one_kind(device, dtype, spans, window):
    check(spans, 16, 2, 2, window, dtype, device, seed=8)


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 24))), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_any_mix(spans, block_size, window, seed):
    check(spans, block_size, 2, 2, window, torch.float32, torch.device("cpu"), seed)


def attend(kv_NCbD, table_B, q_TQD, first, tiles, window, beside=()):
    """The queries of positions ``first`` on of one sequence, after those ``beside`` it: (table, queries, position of
    the first) of others, single queries first."""
    device, block_size = q_TQD.device, kv_NCbD.shape[2]
    spans = [*beside, (table_B, q_TQD, first)]
    spans.sort(key=lambda span: len(span[1]) > 1)
    starts = [0]
    for _, queries, _ in spans:
        starts.append(starts[-1] + len(queries))
    plan = plan_attention(
        starts,
        [position + len(queries) for _, queries, position in spans],
        sum(len(queries) == 1 for _, queries, _ in spans),
        torch.stack([table for table, _, _ in spans]).to(device),
        torch.zeros(starts[-1], dtype=torch.int64, device=device),
        num_kv_heads=kv_NCbD.shape[1] // 2,
        block_size=block_size,
        window=window,
        tiles=tiles,
    )
    out = paged_attention(torch.cat([queries for _, queries, _ in spans]), kv_NCbD, plan, 0.3)
    at = next(i for i, span in enumerate(spans) if span[1] is q_TQD)
    return out[starts[at] : starts[at + 1]]


def check_invariance(length, width, num_kv_heads, group, window, block_size, cuts, dtype, device, seed, threads=(1,)):
    """One sequence of ``length`` tokens: whole, cut, token by token, and in company."""
    generator = torch.Generator().manual_seed(seed)
    columns = -(-length // block_size)
    kv_NCbD = torch.randn(1 + 3 * columns, 2 * num_kv_heads, block_size, width, generator=generator).to(device, dtype)
    tables = (torch.randperm(3 * columns, generator=generator) + 1).int().view(3, columns)
    q_TQD = torch.randn(length, num_kv_heads * group, width, generator=generator).to(device, dtype)
    torch.set_num_threads(1)
    whole = attend(kv_NCbD, tables[0], q_TQD, 0, attention_tiles(width, group, device), window)
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        tiles = attention_tiles(width, group, device)
        others = [(tables[1], q_TQD[:1], length - 1), (tables[2], q_TQD[:1].clone(), 0), (tables[2], q_TQD[:9], 3)]
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            piece = q_TQD[start:stop]
            alone = attend(kv_NCbD, tables[0], piece, start, tiles, window)
            assert torch.equal(alone, whole[start:stop]), (start, stop, num_threads, seed)
            crowd = attend(kv_NCbD, tables[0], piece, start, tiles, window, others)
            assert torch.equal(crowd, whole[start:stop]), ("crowd", start, stop, num_threads, seed)
        for position in {0, 1, 31, 32, 127, 128, 129, length // 2, length - 1} & set(range(length)):
            one = q_TQD[position : position + 1]
            for beside in ((), others):
                got = attend(kv_NCbD, tables[0], one, position, tiles, window, beside)
                assert torch.equal(got, whole[position : position + 1]), (position, num_threads, seed)
    torch.set_num_threads(1)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 192, 256])
def test_a_query_does_not_depend_on_cuts_company_or_threads(device, dtype, group, width):
    window = 100 if group == 2 else None
    check_invariance(290, width, 2, group, window, 16, [7, 16, 150], dtype, device, seed=width + group, threads=(1, 2))


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(12, 300),
    width=st.sampled_from([16, 24, 64]),
    heads=st.sampled_from([(1, 1), (1, 4), (2, 3), (4, 1), (1, 8)]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    block_size=st.sampled_from([1, 4, 16, 24]),
    cuts=st.lists(st.integers(1, 11), min_size=0, max_size=3, unique=True).map(sorted),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_cut_of_any_sequence(length, width, heads, window, block_size, cuts, dtype, seed):
    check_invariance(length, width, *heads, window, block_size, cuts, dtype, torch.device("cpu"), seed)


def test_what_stands_behind_the_last_token_is_not_read(device, dtype):
    """Not even to be multiplied by zero: a block that is in the table but not yet written may hold anything."""
    tiles = attention_tiles(WIDTH, 1, device)
    kv_NCbD = torch.randn(9, 2, 8, WIDTH, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    table_B = torch.arange(1, 9, dtype=torch.int32)
    kv_NCbD[3:] = float("nan")
    q_TQD = torch.randn(1, 1, WIDTH).to(device, dtype)
    assert attend(kv_NCbD, table_B, q_TQD, 15, tiles, None).isfinite().all()
