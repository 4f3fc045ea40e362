"""What attention computes at a time, and into how many programs it is split."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What a head's width decides. ``keys`` and ``segment`` fix the order of sums, so no table may change them."""

    keys: int  # of a tile
    segment: int  # keys; a multiple of ``keys``: 128 KiB of keys and values in bf16
    warps: int
    stages: int


ROWS = 64  # of a tile of queries: the least that wgmma takes
_BUSY_PROGRAMS = 528  # four on each of 132 processors
_WORKSPACE_BYTES = 1 << 28


def attention_tile(head_dim: int) -> AttentionTile:
    """Raises ValueError for widths beyond 256."""
    match triton.next_power_of_2(head_dim):
        case block_d if block_d <= 64:
            return AttentionTile(keys=128, segment=512, warps=4, stages=3)
        case 128:
            return AttentionTile(keys=64, segment=256, warps=4, stages=3)
        case 256:
            return AttentionTile(keys=32, segment=128, warps=8, stages=3)
        case _:
            raise ValueError(f"head_dim must be at most 256, not {head_dim}")


def choose_splits(num_blocks: int, num_kv_heads: int, segments: int, bytes_per_segment: int) -> int:
    """Into how many programs the keys of a query block are split: one for each segment while there are too few programs
    to fill the chip and the unjoined results fit the workspace, else one for all. The bits are the same."""
    programs = num_blocks * num_kv_heads
    fits = programs * segments * bytes_per_segment <= _WORKSPACE_BYTES
    return segments if programs < _BUSY_PROGRAMS and fits else 1
