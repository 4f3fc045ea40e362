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
