"""Which experts to replicate and where to put them, so that ranks are equally loaded and little has to move.

Legend: L layers, E experts, R ranks, C slots of a rank (its capacity), N nodes, G groups of experts; in arrays of
slots an expert or EMPTY.

The load of an expert is shared equally by its replicas, and the load of a rank is the sum over its slots; a step is as
slow as its fullest rank. As in DeepSeek's EPLB, copies go to the experts with the largest share, copies are dealt to
ranks in order of falling share, and where expert groups can be dealt over nodes, a group stays within a node. Beyond
it: a search by single steps follows, an expert is never twice on one rank, and a previous placement is changed only as
far as it pays. Given the same numbers the result is the same everywhere: loads become integers first, and ties go to
the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro.router.balance_search import Ints, greedy, held, improve, rank_loads
from moestro.router.placement import EMPTY, Placement

TOLERANCE = 0.05
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


def balance(
    load_LE: ArrayLike,
    topology: Topology,
    capacity: int,
    *,
    num_groups: int = 1,
    previous: Sequence[Placement] | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Placement, ...]:
    """One placement a layer. ``load_LE`` is in any unit (rows, rows per second), finite and not negative; only ratios
    within a layer matter.

    What a rank may have is judged by the fullest rank of the best plan found from nothing. A layer whose previous
    placement is within ``tolerance`` of that (a fraction of it) stays as it is. Otherwise slots are changed one by one until
    it is within half of ``tolerance``, so that no move is made for less than about that; if this ends above
    ``tolerance``, the plan from nothing is taken, its ranks renamed so that much of it is already in place. What stays on a
    rank stays in its slot. Zero asks for the best plan found, more trades balance for bytes.

    With ``num_groups`` a multiple of the number of nodes, and nodes of equal size, every node gets equally many whole
    groups, whatever that moves (the tolerance is applied to the loads of nodes, then to those of ranks); otherwise groups
    and nodes play no part.

    Raises ValueError naming the argument, the bound and the value.
    """
    load = _checked_load(load_LE)
    L, E = load.shape
    _check(topology, capacity, E, num_groups, tolerance)
    old_LRC = _slots(previous, L, E, topology.num_ranks, capacity)
    loads = _integers(load)
    ranks_of_node = topology.ranks_of_node
    is_grouped = len(ranks_of_node) > 1 and num_groups % len(ranks_of_node) == 0
    if is_grouped and len({len(ranks) for ranks in ranks_of_node}) == 1:
        new_LRC = _solve_by_node(loads, old_LRC, np.array(ranks_of_node), num_groups, tolerance)
        is_allowed = _dealt_groups(old_LRC, np.array(ranks_of_node), E, num_groups)[0]
    else:
        new_LRC = _solve(loads, old_LRC, tolerance)
        is_allowed = np.ones(L, dtype=np.bool_)
    keep = is_allowed & _is_complete(old_LRC, E)
    keep[keep] = _most(loads[keep], old_LRC[keep]) <= _most(loads[keep], new_LRC[keep])
    new_LRC = np.where(keep[:, None, None], old_LRC, new_LRC)
    return tuple(Placement(E, tuple(map(tuple, layer))) for layer in new_LRC.tolist())


def balancedness(load_E: ArrayLike, placement: Placement) -> float:
    """Mean load of a rank over that of the fullest: 1 is perfect, 1 / ranks the worst. 1 when there is no load."""
    load = np.asarray(load_E, dtype=np.float64)
    slots_RC = np.array(placement.slots)
    copies_E = np.bincount(slots_RC[slots_RC != EMPTY], minlength=placement.num_experts)
    share = np.append(load / copies_E, 0.0)  # EMPTY is -1: the last
    load_R = share[slots_RC].sum(axis=1)
    return float(load_R.mean() / load_R.max()) if load_R.max() > 0 else 1.0


def _solve(load_BE: Ints, old_BRC: Ints, tolerance: float, parts: int = 1) -> Ints:
    """slots_BRC, all ranks alike. Every ``parts`` consecutive problems are one layer, as slow as the fullest rank of any."""
    B, R, C = old_BRC.shape
    fresh = _in_place(_from_nothing(load_BE, R, C), old_BRC, load_BE.shape[1])
    best_B = np.repeat(_most(load_BE, fresh).reshape(-1, parts).max(axis=1), parts)
    bearable_B, enough_B = _within(best_B, tolerance), _within(best_B, tolerance / 2)
    kept = old_BRC.copy()
    over = _is_complete(old_BRC, load_BE.shape[1])
    over[over] = _most(load_BE[over], old_BRC[over]) > bearable_B[over]
    kept[over] = improve(load_BE[over], old_BRC[over], enough_B[over], count_moves=True, max_steps=R * C)
    good = _is_complete(kept, load_BE.shape[1])
    good[good] = _most(load_BE[good], kept[good]) <= bearable_B[good]
    good &= _num_moves(old_BRC, kept) <= _num_moves(old_BRC, fresh)
    return np.where(good[:, None, None], kept, fresh)


def _from_nothing(load_BE: Ints, num_ranks: int, capacity: int) -> Ints:
    """slots_BRC; never fuller on the fullest rank than with one copy of each expert in the least capacity."""
    B, E = load_BE.shape
    mean_B = -(-load_BE.sum(axis=1) // num_ranks)
    steps = 2 * num_ranks * capacity

    def refined(rows: NDArray[np.int64], slots_BRC: Ints) -> Ints:
        return improve(load_BE[rows], slots_BRC, mean_B[rows], count_moves=False, max_steps=steps)

    everything = np.arange(B)
    plan = refined(everything, greedy(load_BE, num_ranks, capacity, num_ranks * capacity))
    # Without copies nothing can go below the mean or the hottest expert: only what lies above needs the comparison.
    doubtful = everything[_most(load_BE, plan) > np.maximum(mean_B, load_BE.max(axis=1))]
    least = -(-E // num_ranks)
    if len(doubtful) and least < capacity:
        packed = np.full((len(doubtful), num_ranks, capacity), EMPTY, dtype=np.int64)
        packed[:, :, :least] = refined(doubtful, greedy(load_BE[doubtful], num_ranks, least, num_ranks * least))
        packed = refined(doubtful, packed)
        better = _most(load_BE[doubtful], packed) < _most(load_BE[doubtful], plan[doubtful])
        plan[doubtful[better]] = packed[better]
    return plan


def _solve_by_node(load_LE: Ints, old_LRC: Ints, ranks_NR: Ints, num_groups: int, tolerance: float) -> Ints:
    """slots_LRC: groups are dealt to nodes as experts are to ranks, then each node is a problem of its own."""
    L, E = load_LE.shape
    N, ranks_per_node = ranks_NR.shape
    C = old_LRC.shape[2]
    group_size, experts_per_node = E // num_groups, E // N
    _, old_groups_LNG = _dealt_groups(old_LRC, ranks_NR, E, num_groups)
    groups_LNG = np.sort(_solve(load_LE.reshape(L, num_groups, group_size).sum(axis=2), old_groups_LNG, tolerance), 2)
    experts = (groups_LNG[:, :, :, None] * group_size + np.arange(group_size)).reshape(L, N, experts_per_node)
    # From an expert's id to its number within its node, or EMPTY in the other nodes (and in empty slots, the last).
    local = np.full((L, N, E + 1), EMPTY, dtype=np.int64)
    np.put_along_axis(local, experts, np.broadcast_to(np.arange(experts_per_node), experts.shape), axis=2)
    old_by_node = old_LRC[:, ranks_NR].reshape(L, N, ranks_per_node * C)
    old_local = np.take_along_axis(local, old_by_node % (E + 1), axis=2).reshape(L * N, ranks_per_node, C)
    load_local = np.take_along_axis(load_LE[:, None], experts, axis=2).reshape(L * N, experts_per_node)
    new_local = _solve(load_local, old_local, tolerance, N).reshape(L, N, ranks_per_node * C)
    padded = np.concatenate([experts, np.full((L, N, 1), EMPTY, dtype=np.int64)], axis=2)
    new_by_node = np.take_along_axis(padded, new_local % (experts_per_node + 1), axis=2)
    new_LRC = np.empty_like(old_LRC)
    new_LRC[:, ranks_NR.ravel()] = new_by_node.reshape(L, N * ranks_per_node, C)
    return new_LRC


def _dealt_groups(
    slots_LRC: Ints, ranks_NR: Ints, num_experts: int, num_groups: int
) -> tuple[NDArray[np.bool_], Ints]:
    """Whether each node holds equally many groups and no part of another, and which (all EMPTY if not): groups_LNG."""
    N = len(ranks_NR)
    L = len(slots_LRC)
    by_node_LNE = held(slots_LRC, num_experts)[:, ranks_NR].any(axis=2)
    whole_LNG = by_node_LNE.reshape(L, N, num_groups, -1)
    any_LNG, all_LNG = whole_LNG.any(axis=3), whole_LNG.all(axis=3)
    is_dealt = (
        (any_LNG == all_LNG).all(axis=(1, 2))
        & (any_LNG.sum(axis=1) == 1).all(axis=1)
        & (any_LNG.sum(axis=2) == num_groups // N).all(axis=1)
    )
    groups = np.argsort(~any_LNG, axis=2, kind="stable")[:, :, : num_groups // N]
    return is_dealt, np.where(is_dealt[:, None, None], groups, EMPTY)


def _in_place(new_BRC: Ints, old_BRC: Ints, num_experts: int) -> Ints:
    """The new plan with its ranks renamed and each rank's slots reordered, so that much of it is where it was: pairs of
    ranks with most experts in common are matched first."""
    B, R, _ = new_BRC.shape
    rows = np.arange(B)
    common = held(new_BRC, num_experts).astype(np.float32) @ held(old_BRC, num_experts).astype(np.float32).mT
    renamed = np.empty_like(new_BRC)
    for _ in range(R):
        new_rank, old_rank = np.divmod(common.reshape(B, -1).argmax(axis=1), R)
        renamed[rows, old_rank] = new_BRC[rows, new_rank]
        common[rows, new_rank] = -1
        common[rows, :, old_rank] = -1

    stays = (old_BRC[:, :, :, None] == renamed[:, :, None, :]).any(axis=3) & (old_BRC != EMPTY)
    is_new = ~(renamed[:, :, :, None] == old_BRC[:, :, None, :]).any(axis=3) & (renamed != EMPTY)
    arrivals = np.sort(np.where(is_new, renamed, num_experts), axis=2)
    arrivals[arrivals == num_experts] = EMPTY
    free = np.argsort(stays, axis=2, kind="stable")  # slots without something that stays come first
    placed = np.full_like(old_BRC, EMPTY)
    np.put_along_axis(placed, free, arrivals, axis=2)
    return np.where(stays, old_BRC, placed)


def _most(load_BE: Ints, slots_BRC: Ints) -> Ints:
    return rank_loads(load_BE, slots_BRC).max(axis=1)


def _within(load_B: Ints, tolerance: float) -> Ints:
    return load_B + np.floor(load_B * tolerance).astype(np.int64)


def _num_moves(old_BRC: Ints, new_BRC: Ints) -> Ints:
    return ((old_BRC != new_BRC) & (new_BRC != EMPTY)).sum(axis=(1, 2))


def _is_complete(slots_BRC: Ints, num_experts: int) -> NDArray[np.bool_]:
    return held(slots_BRC, num_experts).any(axis=1).all(axis=1)


def _integers(load_LE: NDArray[np.float64]) -> Ints:
    """Every layer's loads as integers in proportion; a layer without any load is one where all are alike."""
    most = load_LE.max(axis=1, keepdims=True)
    ratio = np.divide(load_LE, most, out=np.ones_like(load_LE), where=most > 0)
    total = np.array([math.fsum(layer) for layer in ratio.tolist()])  # exact: the order of the experts plays no part
    return np.rint(ratio / total[:, None] * _LAYER_LOAD).astype(np.int64)


def _slots(previous: Sequence[Placement] | None, L: int, E: int, R: int, C: int) -> Ints:
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


def _checked_load(load_LE: ArrayLike) -> NDArray[np.float64]:
    load = np.asarray(load_LE, dtype=np.float64)
    if load.ndim != 2 or not load.size:
        raise ValueError(f"load_LE must have the shape (layers, experts), none of them 0, got {load.shape}")
    bad = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if len(bad):
        layer, expert = bad[0].tolist()
        raise ValueError(f"load_LE[{layer}, {expert}] must be finite and at least 0, got {load[layer, expert]}")
    return load


def _check(topology: Topology, capacity: int, num_experts: int, num_groups: int, tolerance: float) -> None:
    if topology.num_ranks < 1:
        raise ValueError("topology must have at least 1 rank, got 0")
    least = -(-num_experts // topology.num_ranks)
    if capacity < least:
        raise ValueError(
            f"capacity must be at least {least} to hold {num_experts} experts on {topology.num_ranks} ranks, got {capacity}"
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide {num_experts} experts, got {num_groups}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
