"""What ``balance`` is asked, checked and turned into integers.

Legend: L layers, E experts, R ranks, C slots of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro.router.balance_search import Ints
from moestro.router.placement import EMPTY, Placement

_LAYER_LOAD = 2**40  # what the loads of a layer add up to as integers


@dataclass(frozen=True, slots=True)
class Topology:
    """``node_of_rank[r]`` is the node of rank r; experts change places more cheaply within one."""

    node_of_rank: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def ranks_of_node(self) -> tuple[tuple[int, ...], ...]:
        """By node, in ascending order of their numbers: its ranks."""
        nodes = sorted(set(self.node_of_rank))
        return tuple(tuple(r for r, node in enumerate(self.node_of_rank) if node == n) for n in nodes)

    @classmethod
    def regular(cls, num_ranks: int, ranks_per_node: int) -> Topology:
        return cls(tuple(rank // ranks_per_node for rank in range(num_ranks)))


def integers(load_LE: NDArray[np.float64]) -> Ints:
    """Every layer's loads as integers in proportion; zeros where a layer has no load."""
    most = load_LE.max(axis=1, keepdims=True)
    ratio = load_LE / np.where(most > 0, most, 1)
    total = np.array([math.fsum(layer) for layer in ratio.tolist()])  # exact: the order of the experts plays no part
    integers_LE: Ints = np.rint(ratio / np.maximum(total, 1)[:, None] * _LAYER_LOAD).astype(np.int64)
    return integers_LE


def weights(slowness: Sequence[float] | None, num_ranks: int) -> Ints:
    """weight_R: slowness as small integers, 1 for all where all are alike."""
    if slowness is not None and (len(slowness) != num_ranks or not all(1 <= x < math.inf for x in slowness)):
        raise ValueError(f"slowness must have {num_ranks} ranks, each finite and at least 1, got {slowness}")
    sixteenths_R = np.rint(np.array(slowness or [1.0] * num_ranks) * 16).astype(np.int64)
    weight_R: Ints = sixteenths_R // np.gcd.reduce(sixteenths_R)
    return weight_R


def previous_slots(previous: Sequence[Placement] | None, L: int, E: int, R: int, C: int) -> Ints:
    """slots_LRC; all EMPTY without a previous placement."""
    if previous is None:
        return np.full((L, R, C), EMPTY, dtype=np.int64)
    if len(previous) != L:
        raise ValueError(f"previous must have {L} layers as load_LE has, got {len(previous)}")
    for layer, placement in enumerate(previous):
        found = (placement.num_experts, placement.num_ranks, placement.capacity)
        if found != (E, R, C):
            raise ValueError(f"previous[{layer}]: experts, ranks and capacity must be {(E, R, C)}, got {found}")
    return np.array([placement.slots for placement in previous], dtype=np.int64)


def checked_load(load_LE: ArrayLike) -> NDArray[np.float64]:
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or not load.size:
        raise ValueError(f"load_LE must have the shape (layers, experts), none of them 0, got {load.shape}")
    bad = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if len(bad):
        layer, expert = bad[0].tolist()
        raise ValueError(f"load_LE[{layer}, {expert}] must be finite and at least 0, got {load[layer, expert]}")
    return load


def check(topology: Topology, capacity: int, num_experts: int, num_groups: int, tolerance: float) -> None:
    if topology.num_ranks < 1:
        raise ValueError("topology must have at least 1 rank, got 0")
    least = -(-num_experts // topology.num_ranks)
    if capacity < least:
        raise ValueError(
            f"capacity must be at least {least} to hold {num_experts} experts on {topology.num_ranks} ranks, "
            f"got {capacity}"
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide {num_experts} experts, got {num_groups}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
