"""Placements of all layers as arrays, and what loads mean under them.

Legend: B buckets of time, L mixture layers, E logical experts, R ranks, C slots of a rank.

All floating-point operations are elementwise or in a fixed order, never a library's reduction, so that ranks on
different processors agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from moestro.router.placement import EMPTY, Placement, moves, moves_of_rank
from moestro.router.rebalance.messages import Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Build with ``tabulate``."""

    num_experts: int
    expert_LRC: Ints  # 0 where empty
    share_LRC: Floats  # part of the expert's rows: one by its number of replicas, 0 where empty
    slowness_R: Floats  # how many times longer a rank takes for a row

    def with_layer(self, layer: int, placement: Placement) -> Tables:
        one = tabulate((placement,))
        expert_LRC, share_LRC = self.expert_LRC.copy(), self.share_LRC.copy()
        expert_LRC[layer], share_LRC[layer] = one.expert_LRC[0], one.share_LRC[0]
        return replace(self, expert_LRC=expert_LRC, share_LRC=share_LRC)

    def slowed(self, slowness_R: Floats) -> Tables:
        """The same placements on ranks of another slowness."""
        return replace(self, slowness_R=slowness_R)

    def only(self, layers: Sequence[int]) -> Tables:
        return replace(self, expert_LRC=self.expert_LRC[layers], share_LRC=self.share_LRC[layers])


def tabulate(placements: Sequence[Placement]) -> Tables:
    """For ranks that are equally fast."""
    slots_LRC = np.array([placement.slots for placement in placements], dtype=np.int64)
    replicas_LE = np.array([[len(slots) for slots in p.slots_of_expert] for p in placements], dtype=np.int64)
    expert_LRC = np.where(slots_LRC == EMPTY, 0, slots_LRC)
    share_LRC = np.where(slots_LRC == EMPTY, 0.0, 1.0 / replicas_LE[_layers(expert_LRC), expert_LRC])
    return Tables(placements[0].num_experts, expert_LRC, share_LRC, np.ones(slots_LRC.shape[1]))


def loads_by_expert(tables: Tables, rows_LRC: Ints) -> Ints:
    """loads_LE: rows by logical expert, from rows by slot. Raises ValueError if an empty slot had rows."""
    if rows_LRC.shape != tables.expert_LRC.shape:
        raise ValueError(f"rows_LRC must have shape {tables.expert_LRC.shape}, got {rows_LRC.shape}")
    if np.any(rows_LRC[tables.share_LRC == 0]):
        raise ValueError("rows_LRC: an empty slot computed rows")
    loads_LE = np.zeros((len(rows_LRC), tables.num_experts), dtype=np.int64)
    np.add.at(loads_LE, (_layers(rows_LRC), tables.expert_LRC), rows_LRC)
    return loads_LE


def rows_by_rank(tables: Tables, loads_BLE: Ints) -> Floats:
    """rows_BLR: what each rank would compute, in rows of a rank that is not slow. Replicas share their expert's rows
    equally: the load model of DeepSeek's EPLB, which an assignment that evens replicas comes close to."""
    rows_BLRC = loads_BLE[:, _layers(tables.expert_LRC), tables.expert_LRC] * tables.share_LRC
    return in_order(rows_BLRC[..., slot] for slot in range(rows_BLRC.shape[-1])) * tables.slowness_R


def in_order(terms: Iterable[Floats]) -> Floats:
    """The sum, first to last."""
    return reduce(np.add, terms)


def bytes_to_load(old: Placement, new: Placement, expert_bytes: int) -> Ints:
    """bytes_R: the weights of the experts that each rank's slots newly get."""
    return np.array(moves_of_rank(moves(old, new), new.num_ranks), dtype=np.int64) * expert_bytes


def _layers(like_LRC: Ints) -> Ints:
    return np.arange(len(like_LRC), dtype=np.int64)[:, None, None]
