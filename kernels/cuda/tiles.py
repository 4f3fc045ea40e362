"""Which tile a kernel takes, from one checked-in table per chip; and how a weight's features are cut into parts.

A tile decides how fast a kernel is and never what it computes: every element is the same chain of matrix instructions
whatever the tile (see ``product.py``). The parts decide the order of a sum, so they follow from the weight's shape
alone.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Kernel = Literal["linear", "linear_fp32", "gate_up", "down", "gate_up_fp8", "down_fp8"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
ROWS = (16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the buckets of rows; the last holds for more, too. Of experts twice their average: many have more."""
MAX_PARALLEL_ROWS = 64
"""Rows up to which the parts of a sum are computed by programs of their own. Partial sums of more rows are as many
bytes as the weight, and there are tiles enough to fill the chip."""

_FOLDER = Path(__file__).parent / "tiles"
_BUSY_BLOCKS = 256  # two on each of 132 processors, in powers of two
_SHORTEST_PART = 512  # features; below, a block is busier starting than reading


@dataclass(frozen=True, slots=True)
class Tile:
    """What one block computes at a time, and with how many warps and stages of loads in flight."""

    out: int  # rows of the weight, a multiple of 64; of gate_up half of them gates
    rows: int  # of activations, a power of two from 16
    features: int  # of both in one step, a power of two
    warps: int  # a multiple of 4
    stages: int


Key = tuple[Kernel, int, int]
"""Kernel, output features, input features; of one expert, and of gate_up of gate and up together."""


@dataclass(frozen=True, slots=True)
class TileTable:
    """What was chosen for one chip; what it does not list gets ``default_tile``."""

    chip: str
    tiles: Mapping[Key, Sequence[tuple[int, Tile]]]  # upper bounds of rows, ascending
    measured: frozenset[Key]  # the others are reasoned defaults

    def choose(self, kernel: Kernel, out_features: int, in_features: int, rows: int) -> Tile:
        listed = self.tiles.get((kernel, out_features, in_features))
        if not listed:
            return default_tile(kernel, out_features, in_features, rows)
        at = bisect_left(listed, rows, key=lambda entry: entry[0])
        return listed[min(at, len(listed) - 1)][1]


def default_tile(kernel: Kernel, out_features: int, in_features: int, rows: int) -> Tile:
    """For few rows small tiles with many loads in flight, since weights are what takes time; for many rows the largest
    accumulators that registers hold."""
    if kernel == "linear_fp32":
        return Tile(64, 16, 32, 4, 3)
    if kernel.endswith("_fp8"):
        return Tile(64, 16, 128, 4, 4) if rows <= 16 else Tile(128, 32 if rows <= 32 else 64, 128, 8, 3)
    if rows <= 16:
        return Tile(64, 16, 128, 4, 5)
    if rows <= 32:
        return Tile(64, 32, 128, 4, 4)
    if rows <= 64:
        return Tile(64, 64, 64, 4, 5)
    parts = kernel == "linear" and part_width(out_features, in_features) < in_features
    # Sums in parts have a second accumulator; and too much of an expert's last tile would be empty.
    large = not parts and rows > (128 if kernel == "linear" else 512)
    return Tile(128, 256, 64, 8, 3) if large else Tile(128, 128, 64, 8, 4)


def part_width(out_features: int, in_features: int) -> int:
    """Features of one part of a dense linear's sum; all of them where its outputs alone keep the chip busy."""
    blocks = tile_count(out_features, 64)
    num_parts = 1
    while num_parts < 8 and blocks * num_parts * 2 <= _BUSY_BLOCKS and in_features >= num_parts * 2 * _SHORTEST_PART:
        num_parts *= 2
    # In steps that every tile's features divide.
    return in_features if num_parts == 1 else tile_count(tile_count(in_features, num_parts), 256) * 256


def tile_count(size: int, tile: int) -> int:
    return -(-size // tile)


def bucket(rows: int) -> int:
    """The bucket of ``ROWS`` that holds ``rows``."""
    return ROWS[min(bisect_left(ROWS, rows), len(ROWS) - 1)]


def read_table(path: Path) -> TileTable:
    """A table as ``benchmarks.tune_tiles`` writes it."""
    written = json.loads(path.read_text(encoding="utf-8"))
    tiles: dict[Key, list[tuple[int, Tile]]] = {}
    measured: set[Key] = set()
    for entry in written["entries"]:
        key: Key = (entry["kernel"], entry["out_features"], entry["in_features"])
        tiles[key] = [(choice["rows"], Tile(**choice["tile"])) for choice in entry["choices"]]
        if entry["measured"]:
            measured.add(key)
    return TileTable(written["chip"], tiles, frozenset(measured))


@cache
def h200() -> TileTable:
    """The only chip so far; others use its table."""
    return read_table(_FOLDER / "h200.json")


@cache
def choose_tile(kernel: Kernel, out_features: int, in_features: int, rows_bucket: int) -> Tile:
    """For ``bucket(rows)`` rows."""
    return h200().choose(kernel, out_features, in_features, rows_bucket)
