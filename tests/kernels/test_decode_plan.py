"""Attention planned on the device alone: the bits of the plan that reads lengths on the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.attention_tiles import attention_tiles
from moestro.kernels.backend import AttentionShape, Decodes, Spans
from moestro.kernels.plain import PlainAttention

WIDTH, COLUMNS = 16, 24


def attention(num_kv_heads: int, group: int, window: int | None, dtype: torch.dtype) -> PlainAttention:
    device = torch.device("cpu")
    shape = AttentionShape(num_kv_heads * group, num_kv_heads, WIDTH, WIDTH, 0.3, window, dtype, device)
    return PlainAttention(shape, None, attention_tiles(WIDTH, group, device))


def tables(contexts: list[int], block_size: int, generator: torch.Generator) -> torch.Tensor:
    """Every entry a block of its own: those behind a context are stale, as a static table's are."""
    order = torch.randperm(len(contexts) * COLUMNS, generator=generator) + 1
    return order.to(torch.int32).view(len(contexts), COLUMNS)


def check(
    contexts: list[int], block_size: int, heads: tuple[int, int], window: int | None, dtype: torch.dtype, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    kernel = attention(*heads, window, dtype)
    table_SB = tables(contexts, block_size, generator)
    slots = [
        int(table_SB[s, (n - 1) // block_size]) * block_size + (n - 1) % block_size for s, n in enumerate(contexts)
    ]
    slot_S = torch.tensor(slots)
    num_blocks, num_rows = int(table_SB.max()) + 1, heads[0] * heads[1] + 2 * heads[0]
    kv_NCbD = torch.randn(num_blocks, 2 * heads[0], block_size, WIDTH, generator=generator).to(dtype)
    kv_NCbD[0] = 0
    qkv_TND = torch.randn(len(contexts), num_rows, WIDTH, generator=generator).to(dtype)
    cos_T1D = torch.randn(len(contexts), 1, WIDTH, generator=generator)
    sin_T1D = torch.randn(len(contexts), 1, WIDTH, generator=generator)
    trimmed_SB = table_SB.clone()
    for s, n in enumerate(contexts):
        trimmed_SB[s, -(-n // block_size) :] = 0
    eager = kernel.plan(Spans(list(range(len(contexts) + 1)), contexts, len(contexts), trimmed_SB, slot_S, block_size))
    static = kernel.plan_decodes(Decodes(torch.tensor(contexts, dtype=torch.int32), table_SB, slot_S, block_size))
    caches = kv_NCbD.clone(), kv_NCbD.clone()
    want = kernel.apply(qkv_TND.clone(), cos_T1D, sin_T1D, caches[0], eager)
    got = kernel.apply(qkv_TND.clone(), cos_T1D, sin_T1D, caches[1], static)
    assert torch.equal(got, want), f"seed {seed}: {(got != want).any(-1).nonzero().tolist()}"
    assert torch.equal(*caches), f"seed {seed}"


@pytest.mark.parametrize("window", [None, 1, 5, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_the_plan_made_on_the_host(window, dtype):
    check([1, 8, 9, 64, 150, 192], 8, (2, 3), window, dtype, seed=3)
    check([17], 8, (1, 4), window, dtype, seed=4)


@settings(max_examples=12, deadline=None)
@given(
    contexts=st.lists(st.integers(1, COLUMNS * 16), min_size=1, max_size=5),
    block_size=st.sampled_from([16, 32]),
    heads=st.sampled_from([(1, 1), (2, 4)]),
    window=st.sampled_from([None, 7, 200]),
    seed=st.integers(0, 2**16),
)
def test_for_any_lengths(contexts, block_size, heads, window, seed):
    check(contexts, block_size, heads, window, torch.bfloat16, seed)
