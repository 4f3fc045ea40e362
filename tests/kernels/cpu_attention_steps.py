"""Sequences that pass through an attention layer in steps, over a cache of their own.

Legend: L tokens of a sequence, T tokens of a step, N heads of queries, keys and values together, Q query heads, D head
width, R rotated width, C slabs of a block, b tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, HeadNorm, PagedAttention, Spans
from moestro.kernels.rotary import rotary_tables

CPU = torch.device("cpu")


def attention_shape(num_heads, num_kv_heads, head_dim, *, rotary_dim=None, window=None, scale=0.3) -> AttentionShape:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    return AttentionShape(num_heads, num_kv_heads, head_dim, rotary_dim, scale, window, torch.bfloat16, CPU)


def head_norm(shape: AttentionShape, seed: int) -> HeadNorm:
    generator = torch.Generator().manual_seed(seed)
    return HeadNorm(torch.rand(shape.num_heads + shape.num_kv_heads, shape.head_dim, generator=generator) + 0.5, 1e-6)


def random_qkv(shape: AttentionShape, length: int, seed: int) -> Tensor:
    heads = shape.num_heads + 2 * shape.num_kv_heads
    return torch.randn(length, heads, shape.head_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tables(shape: AttentionShape, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    frequency_h = 1.0 / 100.0 ** (torch.arange(0, shape.rotary_dim, 2) / max(1, shape.rotary_dim))
    return rotary_tables(torch.tensor(positions, dtype=torch.float32).view(-1, 1) * frequency_h, 1.0)


@dataclass
class Cache:
    """Blocks of what other sequences left behind, handed out in a random order."""

    shape: AttentionShape
    num_blocks: int
    block_size: int
    seed: int
    left_behind: float = float("nan")
    kv_NCbD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        slabs = 2 * self.shape.num_kv_heads
        size = (1 + self.num_blocks, slabs, self.block_size, self.shape.head_dim)
        self.kv_NCbD = torch.full(size, self.left_behind, dtype=torch.bfloat16)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed)) + 1
        self._free = order.tolist()
        self._blocks: dict[int, list[int]] = {}

    def table(self, sequence: int, length: int) -> list[int]:
        blocks = self._blocks.setdefault(sequence, [])
        while len(blocks) * self.block_size < length:
            blocks.append(self._free.pop())
        return blocks

    def slots(self, sequence: int, start: int, stop: int) -> list[int]:
        blocks, size = self.table(sequence, stop), self.block_size
        return [blocks[p // size] * size + p % size for p in range(start, stop)]


@dataclass(frozen=True)
class Step:
    """What one step computed."""

    spans: Spans
    q_TQD: Tensor  # as the layer left them
    out_TQD: Tensor


def step(attention: PagedAttention, cache: Cache, pieces: Sequence[tuple[int, Tensor, int, int]]) -> Step:
    """``pieces`` are (sequence, its qkv_LND, start, stop); single tokens first."""
    starts, contexts, slots, positions, rows = [0], [], [], [], []
    for sequence, qkv_LND, start, stop in pieces:
        starts.append(starts[-1] + stop - start)
        contexts.append(stop)
        slots += cache.slots(sequence, start, stop)
        positions += range(start, stop)
        rows.append(qkv_LND[start:stop])
    columns = max((-(-stop // cache.block_size) for _, _, _, stop in pieces), default=0)
    table_SB = torch.zeros(len(pieces), columns, dtype=torch.int32)
    for s, (sequence, _, _, stop) in enumerate(pieces):
        blocks = cache.table(sequence, stop)[:columns]
        table_SB[s, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    num_decodes = sum(stop - start == 1 for _, _, start, stop in pieces)
    spans = Spans(starts, contexts, num_decodes, table_SB, torch.tensor(slots, dtype=torch.int64), cache.block_size)
    heads = cache.shape.num_heads + 2 * cache.shape.num_kv_heads
    qkv_TND = torch.cat([*rows, torch.empty(0, heads, cache.shape.head_dim, dtype=torch.bfloat16)])
    out_TQD = attention.apply(qkv_TND, *tables(cache.shape, positions), cache.kv_NCbD, attention.plan(spans))
    return Step(spans, qkv_TND[:, : cache.shape.num_heads], out_TQD)


def in_steps(attention: PagedAttention, cache: Cache, sequence: int, qkv_LND: Tensor, cuts: Sequence[int]) -> Tensor:
    """out_LQD of one sequence alone, cut at ``cuts``."""
    bounds = [0, *cuts, len(qkv_LND)]
    pairs = pairwise(bounds)
    return torch.cat([step(attention, cache, [(sequence, qkv_LND, start, stop)]).out_TQD for start, stop in pairs])
