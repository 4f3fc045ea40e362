"""Which rows go to which expert: a counting sort of (token, slot) pairs, and the tiles that the experts' products
work on.

Legend: T tokens, K slots per token, P = T * K pairs, R rows, L slots for experts (padded to a power of two with at
least one to spare), N rows of a tile, B tiles, C programs that sort.

No row is moved and none is padded: a tile is a slot and at most N places of the order, whose rows a product gathers and
scatters itself. Everything stays on the device, with shapes that depend on T, K and L only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 128  # of one program
_TILES = 16  # of one program
_WARPS = 8


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile b is places ``first : end`` of the order, at most N, all of one slot; where there is no tile, the slot is -1
    and the end at most the first.
    The order of rows that are sorted already is None."""

    table_3B: Tensor  # int32: slot, first and end of each tile
    order_P: Tensor | None  # int32: pairs by slot and among equals by token

    @property
    def most(self) -> int:
        """However the rows are spread."""
        return self.table_3B.shape[1]


@triton.jit
def _put_tiles(counts_L, block, table_ptr, num_tiles, N: tl.constexpr, TILES: tl.constexpr):
    tile_B = block * TILES + tl.arange(0, TILES)
    l = tl.arange(0, counts_L.shape[0])
    tiles_L = (counts_L + N - 1) // N
    ends_L = tl.cumsum(tiles_L, 0)  # tiles up to this slot, itself included
    slot_B = tl.sum((ends_L[None, :] <= tile_B[:, None]).to(tl.int32), 1)
    mine_BL = l[None, :] == slot_B[:, None]
    row_end_B = tl.sum(tl.where(mine_BL, tl.cumsum(counts_L, 0)[None, :], 0), 1)
    count_B = tl.sum(tl.where(mine_BL, counts_L[None, :], 0), 1)
    tile_of_slot_B = tile_B - tl.sum(tl.where(mine_BL, (ends_L - tiles_L)[None, :], 0), 1)
    first_B = row_end_B - count_B + tile_of_slot_B * N
    exists_B = tile_B < tl.sum(tiles_L, 0)
    written_B = tile_B < num_tiles
    tl.store(table_ptr + tile_B, tl.where(exists_B, slot_B, -1), mask=written_B)
    tl.store(table_ptr + num_tiles + tile_B, first_B, mask=written_B)
    tl.store(table_ptr + 2 * num_tiles + tile_B, tl.minimum(first_B + N, row_end_B), mask=written_B)


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def tiles_kernel(counts_ptr, table_ptr, num_slots, num_tiles, L: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr):
    l = tl.arange(0, L)
    counts_L = tl.load(counts_ptr + l, mask=l < num_slots, other=0).to(tl.int32)
    _put_tiles(counts_L, tl.program_id(0), table_ptr, num_tiles, N, TILES)


@triton.jit
def _load_slots(slots_ptr, p_P, num_pairs, L: tl.constexpr):
    return tl.load(slots_ptr + p_P, mask=p_P < num_pairs, other=L - 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(slots_ptr, histogram_ptr, num_pairs, L: tl.constexpr, PAIRS: tl.constexpr):
    """histogram_CL: how many of each program's pairs are of each slot."""
    pid = tl.program_id(0)
    slot_P = _load_slots(slots_ptr, pid * PAIRS + tl.arange(0, PAIRS), num_pairs, L)
    tl.store(histogram_ptr + pid * L + tl.arange(0, L), tl.histogram(slot_P, L))


@triton.jit(do_not_specialize=["num_pairs", "num_slots", "num_programs", "num_tiles"])
def place_kernel(
    slots_ptr,
    histogram_ptr,
    counts_ptr,  # int64 [L]
    order_ptr,
    table_ptr,
    num_pairs,
    num_slots,
    num_programs,  # that place; those after them write tiles
    num_tiles,
    L: tl.constexpr,
    N: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
):
    pid = tl.program_id(0)
    l = tl.arange(0, L)
    c = tl.arange(0, 8)
    total_L = tl.zeros((L,), tl.int32)
    before_L = tl.zeros((L,), tl.int32)  # in the programs before this one
    for c0 in range(0, num_programs, 8):
        histogram_CL = tl.load(
            histogram_ptr + (c0 + c)[:, None] * L + l[None, :], mask=(c0 + c)[:, None] < num_programs, other=0
        )
        total_L += tl.sum(histogram_CL, 0)
        before_L += tl.sum(tl.where((c0 + c)[:, None] < pid, histogram_CL, 0), 0)
    if pid == 0:
        tl.store(counts_ptr + l, total_L.to(tl.int64), mask=l < num_slots)
    if pid < num_programs:
        p = tl.arange(0, PAIRS)
        p_P = pid * PAIRS + p
        slot_P = _load_slots(slots_ptr, p_P, num_pairs, L)
        # The column's own slots once more, rather than a change of layout.
        other_P = _load_slots(slots_ptr, p_P, num_pairs, L)
        rank_P = tl.sum(((slot_P[:, None] == other_P[None, :]) & (p[None, :] < p[:, None])).to(tl.int32), 1)
        place_P = tl.gather(tl.cumsum(total_L, 0) - total_L + before_L, slot_P, 0) + rank_P
        tl.store(order_ptr + place_P, p_P, mask=p_P < num_pairs)
    else:
        # The spare slot at the end holds what is no pair.
        counts_L = tl.where(l < num_slots, total_L, 0)
        _put_tiles(counts_L, pid - num_programs, table_ptr, num_tiles, N, TILES)


def sort_pairs(slots_TK: Tensor, num_slots: int, rows_of_tile: int) -> tuple[Tiles, Tensor]:
    """The tiles of all pairs, and counts_L (int64), in two launches; reference: ``grouped_experts.sort_by_slot``."""
    num_pairs, device = slots_TK.numel(), slots_TK.device
    padded, programs = padded_slots(num_slots), _count(num_pairs, _PAIRS)
    num_tiles = _most_tiles(num_pairs, num_slots, rows_of_tile)
    histogram_CL = torch.empty(programs, padded, dtype=torch.int32, device=device)
    counts_L = torch.empty(num_slots, dtype=torch.int64, device=device)
    order_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    table_3B = torch.empty(3, num_tiles, dtype=torch.int32, device=device)
    slots_TK = slots_TK.contiguous()
    count_kernel[(programs,)](
        slots_TK, histogram_CL, num_pairs, L=padded, PAIRS=_PAIRS, num_warps=_WARPS, enable_fp_fusion=False
    )
    place_kernel[(programs + _count(num_tiles, _TILES),)](
        slots_TK,
        histogram_CL,
        counts_L,
        order_P,
        table_3B,
        num_pairs,
        num_slots,
        programs,
        num_tiles,
        L=padded,
        N=rows_of_tile,
        PAIRS=_PAIRS,
        TILES=_TILES,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return Tiles(table_3B, order_P), counts_L


def tiles_of_sorted(counts_L: Tensor, num_rows: int, rows_of_tile: int) -> Tiles:
    """The tiles of ``num_rows`` rows, padding included, that are sorted by slot already: one launch."""
    num_slots, num_tiles = counts_L.numel(), _most_tiles(num_rows, counts_L.numel(), rows_of_tile)
    table_3B = torch.empty(3, num_tiles, dtype=torch.int32, device=counts_L.device)
    tiles_kernel[(_count(num_tiles, _TILES),)](
        counts_L.contiguous(),
        table_3B,
        num_slots,
        num_tiles,
        L=padded_slots(num_slots),
        N=rows_of_tile,
        TILES=_TILES,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return Tiles(table_3B, None)


def _most_tiles(num_rows: int, num_slots: int, rows_of_tile: int) -> int:
    """However the rows are spread: each slot's last tile may be short."""
    return min(num_rows, num_slots + num_rows // rows_of_tile)


def padded_slots(num_slots: int) -> int:
    """A power of two with at least one to spare, for what is no pair."""
    return max(16, int(triton.next_power_of_2(num_slots + 1)))


def _count(size: int, step: int) -> int:
    return -(-size // step)
