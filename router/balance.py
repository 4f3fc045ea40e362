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

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from moestro.router.balance_problem import Topology, check, checked_load, integers, previous_slots, weights
from moestro.router.balance_search import Bools, Ints, greedy, held, improve, rank_loads
from moestro.router.placement import EMPTY, Placement

TOLERANCE = 0.05
NEGLIGIBLE = 0.001  # of a rank's load: not worth a search
_LAST = np.iinfo(np.int64).max  # sorts behind every expert


def balance(
    load_LE: ArrayLike,
    topology: Topology,
    capacity: int,
    *,
    num_groups: int = 1,
    previous: Sequence[Placement] | None = None,
    tolerance: float = TOLERANCE,
    slowness: Sequence[float] | None = None,
) -> tuple[Placement, ...]:
    """One placement a layer. ``load_LE`` is in any unit (rows, rows per second), finite and not negative; only ratios
    within a layer matter.

    What a rank may have is judged by the fullest rank of the best plan found from nothing. A layer whose previous
    placement is within ``tolerance`` of that (a fraction of it) stays as it is. Otherwise slots are changed one by one
    until it is within half of ``tolerance``, so that no layer is touched to gain much less than that. Only if the
    changes end above twice ``tolerance``, the plan from nothing is taken, its ranks renamed so that some of it is
    already in place: it moves most experts. What stays on a rank stays in its slot. Zero (it counts as NEGLIGIBLE) asks
    for the best plan found, more trades balance for bytes.

    With ``num_groups`` a multiple of the number of nodes, and nodes of equal size, every node gets equally many whole
    groups, whatever that moves (the tolerance is applied to the loads of nodes, then to those of ranks); otherwise
    groups and nodes play no part.

    A rank that takes ``slowness`` times as long for the same work (by rank, at least 1) counts as that much fuller.

    Raises ValueError naming the argument, the bound and the value.
    """
    load = checked_load(load_LE)
    L, E = load.shape
    check(topology, capacity, E, num_groups, tolerance)
    old_LRC = previous_slots(previous, L, E, topology.num_ranks, capacity)
    weight_R = weights(slowness, topology.num_ranks)
    weight_LR = np.broadcast_to(weight_R, (L, topology.num_ranks))
    loads = integers(load)
    ranks_of_node = topology.ranks_of_node
    is_grouped = len(ranks_of_node) > 1 and num_groups % len(ranks_of_node) == 0
    if is_grouped and len({len(ranks) for ranks in ranks_of_node}) == 1:
        new_LRC = _solve_by_node(loads, old_LRC, weight_R, np.array(ranks_of_node), num_groups, tolerance)
        is_allowed = _dealt_groups(old_LRC, np.array(ranks_of_node), E, num_groups)[0]
    else:
        new_LRC = _solve(loads, old_LRC, weight_LR, tolerance)
        is_allowed = np.ones(L, dtype=np.bool_)
    keep = is_allowed & _is_complete(old_LRC, E)
    old_L, new_L = (_most(loads[keep], slots_LRC[keep], weight_LR[keep]) for slots_LRC in (old_LRC, new_LRC))
    keep[keep] = old_L <= new_L
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


def _solve(load_BE: Ints, old_BRC: Ints, weight_BR: Ints, tolerance: float, parts: int = 1) -> Ints:
    """slots_BRC, all ranks alike. Every ``parts`` consecutive problems are one layer, as slow as its fullest rank."""
    _, R, C = old_BRC.shape
    fresh = _in_old_slots(
        _with_ranks_renamed(_from_nothing(load_BE, weight_BR, C), old_BRC, weight_BR, load_BE.shape[1]), old_BRC
    )
    best_B = np.repeat(_most(load_BE, fresh, weight_BR).reshape(-1, parts).max(axis=1), parts)
    bearable_B, enough_B = _within(best_B, tolerance), _within(best_B, tolerance / 2)
    kept = old_BRC.copy()
    over = _is_complete(old_BRC, load_BE.shape[1])
    over[over] = _most(load_BE[over], old_BRC[over], weight_BR[over]) > bearable_B[over]
    steps = improve(load_BE[over], old_BRC[over], weight_BR[over], enough_B[over], count_moves=True, max_steps=R * C)
    kept[over] = _in_old_slots(steps, old_BRC[over])  # a step may bring back what another took away
    good = _is_complete(kept, load_BE.shape[1])
    good[good] = _most(load_BE[good], kept[good], weight_BR[good]) <= _within(best_B, 2 * tolerance)[good]
    good &= _num_moves(old_BRC, kept) <= _num_moves(old_BRC, fresh)
    return np.where(good[:, None, None], kept, fresh)


def _from_nothing(load_BE: Ints, weight_BR: Ints, capacity: int) -> Ints:
    """slots_BRC; the fullest rank is never fuller, but for NEGLIGIBLE, than with one copy of each expert."""
    (B, E), num_ranks = load_BE.shape, weight_BR.shape[1]
    even_B = np.ceil(load_BE.sum(axis=1) / (1 / weight_BR).sum(axis=1)).astype(np.int64)  # on every rank alike
    mean_B = _within(even_B, NEGLIGIBLE)

    def refined(rows: Ints, slots_BRC: Ints) -> Ints:
        steps = 2 * num_ranks * capacity
        return improve(load_BE[rows], slots_BRC, weight_BR[rows], mean_B[rows], count_moves=False, max_steps=steps)

    everything = np.arange(B)
    plan = refined(everything, greedy(load_BE, weight_BR, capacity, num_ranks * capacity))
    # Without copies nothing gets below the mean or the hottest expert: only what lies above needs the comparison.
    bound_B = np.maximum(mean_B, _within(load_BE.max(axis=1) * weight_BR.min(axis=1), NEGLIGIBLE))
    doubtful = everything[_most(load_BE, plan, weight_BR) > bound_B]
    least = -(-E // num_ranks)
    if len(doubtful) and least < capacity:
        packed = np.full((len(doubtful), num_ranks, capacity), EMPTY, dtype=np.int64)
        least_copies = greedy(load_BE[doubtful], weight_BR[doubtful], least, num_ranks * least)
        packed[:, :, :least] = refined(doubtful, least_copies)
        packed = refined(doubtful, packed)
        most_of = partial(_most, load_BE[doubtful], weight_BR=weight_BR[doubtful])
        better = most_of(packed) < most_of(plan[doubtful])
        plan[doubtful[better]] = packed[better]
    return plan


def _solve_by_node(
    load_LE: Ints, old_LRC: Ints, weight_R: Ints, ranks_NR: Ints, num_groups: int, tolerance: float
) -> Ints:
    """slots_LRC: groups are dealt to nodes as experts are to ranks, then each node is a problem of its own."""
    L, E = load_LE.shape
    N, ranks_per_node = ranks_NR.shape
    C = old_LRC.shape[2]
    group_size, experts_per_node = E // num_groups, E // N
    _, old_groups_LNG = _dealt_groups(old_LRC, ranks_NR, E, num_groups)
    weight_NR = weight_R[ranks_NR]
    weight_N = np.rint(ranks_per_node / (1 / weight_NR).sum(axis=1)).astype(np.int64)
    group_load_LG = load_LE.reshape(L, num_groups, group_size).sum(axis=2)
    groups_LNG = np.sort(_solve(group_load_LG, old_groups_LNG, np.broadcast_to(weight_N, (L, N)), tolerance), 2)
    experts = (groups_LNG[:, :, :, None] * group_size + np.arange(group_size)).reshape(L, N, experts_per_node)
    # From an expert's id to its number within its node, or EMPTY in the other nodes (and in empty slots, the last).
    local = np.full((L, N, E + 1), EMPTY, dtype=np.int64)
    np.put_along_axis(local, experts, np.broadcast_to(np.arange(experts_per_node), experts.shape), axis=2)
    old_by_node = old_LRC[:, ranks_NR].reshape(L, N, ranks_per_node * C)
    old_local = np.take_along_axis(local, old_by_node % (E + 1), axis=2).reshape(L * N, ranks_per_node, C)
    load_local = np.take_along_axis(load_LE[:, None], experts, axis=2).reshape(L * N, experts_per_node)
    new_local = _solve(load_local, old_local, np.tile(weight_NR, (L, 1)), tolerance, N).reshape(
        L, N, ranks_per_node * C
    )
    padded = np.concatenate([experts, np.full((L, N, 1), EMPTY, dtype=np.int64)], axis=2)
    new_by_node = np.take_along_axis(padded, new_local % (experts_per_node + 1), axis=2)
    new_LRC = np.empty_like(old_LRC)
    new_LRC[:, ranks_NR.ravel()] = new_by_node.reshape(L, N * ranks_per_node, C)
    return new_LRC


def _dealt_groups(slots_LRC: Ints, ranks_NR: Ints, num_experts: int, num_groups: int) -> tuple[Bools, Ints]:
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


def _with_ranks_renamed(new_BRC: Ints, old_BRC: Ints, weight_BR: Ints, num_experts: int) -> Ints:
    """The new plan with its ranks in another order: those with most experts in common with an old one take its place
    first. Only ranks of equal weight change names."""
    B, R, _ = new_BRC.shape
    rows = np.arange(B)
    common = held(new_BRC, num_experts).astype(np.float32) @ held(old_BRC, num_experts).astype(np.float32).mT
    common[weight_BR[:, :, None] != weight_BR[:, None, :]] = -1
    renamed = np.empty_like(new_BRC)
    for _ in range(R):
        new_rank, old_rank = np.divmod(common.reshape(B, -1).argmax(axis=1), R)
        renamed[rows, old_rank] = new_BRC[rows, new_rank]
        common[rows, new_rank] = -2
        common[rows, :, old_rank] = -2
    return renamed


def _in_old_slots(new_BRC: Ints, old_BRC: Ints) -> Ints:
    """The new plan with each rank's slots in another order: what stays keeps its slot, what arrives follows by id."""
    stays = (old_BRC[:, :, :, None] == new_BRC[:, :, None, :]).any(axis=3) & (old_BRC != EMPTY)
    is_new = ~(new_BRC[:, :, :, None] == old_BRC[:, :, None, :]).any(axis=3) & (new_BRC != EMPTY)
    arrivals = np.sort(np.where(is_new, new_BRC, _LAST), axis=2)
    free = np.argsort(stays, axis=2, kind="stable")  # slots without something that stays come first
    placed = np.full_like(old_BRC, EMPTY)
    np.put_along_axis(placed, free, np.where(arrivals == _LAST, EMPTY, arrivals), axis=2)
    return np.where(stays, old_BRC, placed)


def _most(load_BE: Ints, slots_BRC: Ints, weight_BR: Ints) -> Ints:
    most_B: Ints = rank_loads(load_BE, slots_BRC, weight_BR).max(axis=1)
    return most_B


def _within(load_B: Ints, tolerance: float) -> Ints:
    within_B: Ints = load_B + np.floor(load_B * max(tolerance, NEGLIGIBLE)).astype(np.int64)
    return within_B


def _num_moves(old_BRC: Ints, new_BRC: Ints) -> Ints:
    num_B: Ints = ((old_BRC != new_BRC) & (new_BRC != EMPTY)).sum(axis=(1, 2))
    return num_B


def _is_complete(slots_BRC: Ints, num_experts: int) -> Bools:
    is_held_BE = np.logical_or.reduce(held(slots_BRC, num_experts), axis=1)
    complete_B: Bools = np.logical_and.reduce(is_held_BE, axis=1)
    return complete_B
