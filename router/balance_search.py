"""Packing replicas onto ranks, for many independent problems at once: the search behind ``balance``.

Legend: B problems, E experts, R ranks, C slots of a rank; arrays of slots hold experts or EMPTY. The load of a rank is
the sum of its slots' shares times its weight, which is greater where the same rows take longer.

All loads are int64, so no result depends on the order of a sum, and ties go to the lowest index. An expert's load is
shared equally by its replicas. Every step of the search lowers the load of the fullest rank and leaves each rank it
touches below what that one had: the sorted vector of rank loads falls, so the search ends, and its plan is never worse
than its start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.router.placement import EMPTY

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEVER = np.iinfo(np.int64).max // 4  # above any load


def share(load: Ints, replicas: Ints) -> Ints:
    """The load of each of so many replicas, rounded up."""
    part: Ints = -(-load // np.maximum(replicas, 1))
    return part


def held(slots_BRC: Ints, num_experts: int) -> Bools:
    """held_BRE: which rank has a copy of which expert."""
    B, R, _ = slots_BRC.shape
    held_BRE = np.zeros((B, R, num_experts + 1), dtype=np.bool_)
    np.put_along_axis(held_BRE, slots_BRC, True, axis=2)  # EMPTY is -1: the last, cut off below
    return held_BRE[:, :, :num_experts]


def rank_loads(load_BE: Ints, slots_BRC: Ints, weight_BR: Ints) -> Ints:
    """load_BR."""
    return _State(load_BE, slots_BRC, weight_BR).load_BR


def greedy(load_BE: Ints, weight_BR: Ints, capacity: int, num_copies: int) -> Ints:
    """slots_BRC from nothing: ``num_copies`` copies shared out so that the largest share is least (an expert with no
    load gets one, and none gets more than there are ranks), then dealt in order of falling share, each to the emptiest
    ranks with a free slot. Copies that find no rank of their own are left out."""
    (B, E), num_ranks = load_BE.shape, weight_BR.shape[1]
    rows = np.arange(B)
    copies_BE = np.ones((B, E), dtype=np.int64)
    share_BE = load_BE.copy() if num_ranks > 1 else np.zeros_like(load_BE)
    for _ in range(num_copies - E):
        best = share_BE.argmax(axis=1)
        copies_BE[rows, best] += share_BE[rows, best] > 0
        copies = copies_BE[rows, best]
        share_BE[rows, best] = np.where(copies < num_ranks, share(load_BE[rows, best], copies), 0)

    share_BE = share(load_BE, copies_BE)
    slots_BRC = np.full((B, num_ranks, capacity), EMPTY, dtype=np.int64)
    used_BR = np.zeros((B, num_ranks), dtype=np.int64)
    load_BR = np.zeros((B, num_ranks), dtype=np.int64)
    for experts in np.argsort(-share_BE, axis=1, kind="stable").T:
        free = (used_BR < capacity).sum(axis=1)
        wanted = np.minimum(copies_BE[rows, experts], free)
        after_BR = (load_BR + share_BE[rows, experts][:, None]) * weight_BR
        by_load = np.lexsort((used_BR, np.where(used_BR < capacity, after_BR, NEVER)), axis=1)
        row, nth = np.nonzero(np.arange(num_ranks) < wanted[:, None])
        rank = by_load[row, nth]
        slots_BRC[row, rank, used_BR[row, rank]] = experts[row]
        used_BR[row, rank] += 1
        load_BR[row, rank] += share(load_BE[rows, experts], wanted)[row]
    return slots_BRC


def improve(
    load_BE: Ints, slots_BRC: Ints, weight_BR: Ints, enough_B: Ints, *, count_moves: bool, max_steps: int
) -> Ints:
    """slots_BRC after steps that each relieve the fullest rank, until none has more than ``enough_B``, no step helps or
    ``max_steps`` are done. A step swaps two slots or writes one more copy of an expert over an empty slot or over one
    of several copies of another. With ``count_moves`` the step that gains most per slot written is taken, otherwise the
    one that gains most."""
    slots_BRC = slots_BRC.copy()
    active = np.arange(len(load_BE))
    for _ in range(max_steps):
        load_BR = rank_loads(load_BE[active], slots_BRC[active], weight_BR[active])
        active = active[load_BR.max(axis=1) > enough_B[active]]
        if not len(active):
            break
        state = _State(load_BE[active], slots_BRC[active], weight_BR[active])
        steps = _best_steps(state, enough_B[active], count_moves)
        helps = steps.helps_B
        rows, fullest = active[helps], state.fullest_B[helps]
        a, rank, slot = steps.from_slot_B[helps], steps.to_rank_B[helps], steps.to_slot_B[helps]
        out, back = slots_BRC[rows, fullest, a], slots_BRC[rows, rank, slot]
        slots_BRC[rows, rank, slot] = out
        slots_BRC[rows, fullest, a] = np.where(steps.swaps_B[helps], back, out)
        active = rows
    return slots_BRC


class _State:
    """What follows from loads, slots and weights."""

    def __init__(self, load_BE: Ints, slots_BRC: Ints, weight_BR: Ints) -> None:
        B, R, C = slots_BRC.shape
        E = load_BE.shape[1]
        self.load_BE, self.slots_BRC, self.weight_BR = load_BE, slots_BRC, weight_BR
        rows = np.arange(B)[:, None]
        flat = (rows * (E + 1) + np.where(slots_BRC == EMPTY, E, slots_BRC).reshape(B, R * C)).ravel()
        counts = np.bincount(flat, minlength=B * (E + 1)).reshape(B, E + 1).astype(np.int64)
        self.copies_BE = counts[:, :E]
        self.share_BE = share(load_BE, self.copies_BE)
        self.share_BRC = per_slot(self.share_BE, slots_BRC)
        self.sum_BR: Ints = self.share_BRC.sum(axis=2)
        self.load_BR: Ints = self.sum_BR * weight_BR
        self.fullest_B = self.load_BR.argmax(axis=1)
        self.top_B = self.load_BR.max(axis=1)

    def of_fullest(self, values_BR: Ints) -> Ints:
        """values_B1."""
        return np.take_along_axis(values_BR, self.fullest_B[:, None], axis=1)


def per_slot(values_BE: Ints, slots_BRC: Ints, empty: int = 0) -> Ints:
    """values_BRC: of the expert in each slot, ``empty`` for a slot without one."""
    B, R, C = slots_BRC.shape
    padded = np.concatenate([values_BE, np.full((B, 1), empty, dtype=np.int64)], axis=1)
    return np.take_along_axis(padded, slots_BRC.reshape(B, R * C) % padded.shape[1], axis=1).reshape(B, R, C)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The chosen step of each problem: slot ``from_slot`` of the fullest rank swaps with, or is copied to, another."""

    helps_B: Bools
    swaps_B: Bools
    from_slot_B: Ints
    to_rank_B: Ints
    to_slot_B: Ints


def _best_steps(state: _State, enough_B: Ints, count_moves: bool) -> _Steps:
    """By the highest load that the ranks it touches have afterwards; anything below ``enough_B`` is as good as that,
    and of equally good steps the one with the lowest such load."""
    B, R, C = state.slots_BRC.shape
    rows = np.arange(B)
    after_XB = np.stack([_after_swap(state), _after_copy(state)])  # two kinds of step: B, C, R, C
    after = np.moveaxis(after_XB, 0, 1).reshape(B, 2, -1)
    gain = state.top_B[:, None, None] - np.maximum(after, enough_B[:, None, None])
    if count_moves:
        gain[:, 1] *= 2
    gain = gain.reshape(B, -1)
    most = gain.max(axis=1)
    choice = np.where(gain == most[:, None], after.reshape(B, -1), NEVER).argmin(axis=1)
    kind, place = np.divmod(choice, C * R * C)
    from_slot, to = np.divmod(place, R * C)
    to_rank, to_slot = np.divmod(to, C)
    return _Steps(after.reshape(B, -1)[rows, choice] < state.top_B, kind == 0, from_slot, to_rank, to_slot)


def _after_swap(state: _State) -> Ints:
    """after_BCRC: the higher of both ranks' loads if slot C of the fullest rank and slot C of rank R change places."""
    rows = np.arange(len(state.slots_BRC))
    mine_BC, share_BC = state.slots_BRC[rows, state.fullest_B], state.share_BRC[rows, state.fullest_B]
    left_BC = state.of_fullest(state.sum_BR) - share_BC
    rest_BRC = state.sum_BR[:, :, None] - state.share_BRC
    after = np.maximum(
        (left_BC[:, :, None, None] + state.share_BRC[:, None]) * state.of_fullest(state.weight_BR)[:, :, None, None],
        (rest_BRC[:, None] + share_BC[:, :, None, None]) * state.weight_BR[:, None, :, None],
    )
    return _forbid(after, _holds_mine(state, mine_BC), _is_mine(state, mine_BC))


def _after_copy(state: _State) -> Ints:
    """after_BCRC: the highest load among the ranks concerned if slot C of rank R gets one more copy of what slot C of
    the fullest rank has."""
    rows = np.arange(len(state.slots_BRC))
    mine_BC, share_BC = state.slots_BRC[rows, state.fullest_B], state.share_BRC[rows, state.fullest_B]
    thinner_BE = share(state.load_BE, state.copies_BE + 1)
    thinner_BC = np.take_along_axis(thinner_BE, np.maximum(mine_BC, 0), axis=1)
    left_BC = (state.of_fullest(state.sum_BR) - share_BC + thinner_BC) * state.of_fullest(state.weight_BR)
    rest_BRC = state.sum_BR[:, :, None] - state.share_BRC
    lost_BRC = _after_loss(state)
    after = (rest_BRC[:, None] + thinner_BC[:, :, None, None]) * state.weight_BR[:, None, :, None]
    np.maximum(after, left_BC[:, :, None, None], out=after)
    np.maximum(after, lost_BRC[:, None], out=after)
    return _forbid(after, _holds_mine(state, mine_BC), np.zeros_like(state.slots_BRC, dtype=np.bool_))


def _after_loss(state: _State) -> Ints:
    """after_BRC: the highest load among the ranks that keep a copy of what is in a slot, once this copy is gone, or
    more where weights differ: what comes to the fullest of them counts as if it came to the heaviest rank of all. NEVER
    if it is the only one, 0 for an empty slot."""
    B, R, C = state.slots_BRC.shape
    E = state.load_BE.shape[1]
    rows_B1 = np.arange(B)[:, None]
    by_load = np.argsort(state.load_BR, axis=1, kind="stable")
    rank = np.repeat(by_load, C, axis=1)
    expert = np.take_along_axis(state.slots_BRC, by_load[:, :, None], axis=1).reshape(B, R * C)
    # Ranks come in order of rising load and the last write stays: the fullest holder, then the fullest of the others.
    first = np.full((B, E + 1), -1, dtype=np.int64)
    first[rows_B1, expert] = rank
    second = np.full((B, E + 1), -1, dtype=np.int64)
    other = np.where(rank == first[rows_B1, expert], E, expert)
    second[rows_B1, other] = rank
    first_BRC, second_BRC = per_slot(first[:, :E], state.slots_BRC), per_slot(second[:, :E], state.slots_BRC)
    keeper = np.where(first_BRC == np.arange(R)[:, None], second_BRC, first_BRC).reshape(B, R * C)
    keeper_load = np.take_along_axis(state.load_BR, np.maximum(keeper, 0), axis=1).reshape(B, R, C)
    thicker_BE = (share(state.load_BE, state.copies_BE - 1) - state.share_BE) * state.weight_BR.max(axis=1)[:, None]
    after = keeper_load + per_slot(thicker_BE, state.slots_BRC)
    after = np.where(per_slot(state.copies_BE, state.slots_BRC, 2) < 2, NEVER, after)
    return np.where(state.slots_BRC == EMPTY, 0, after)


def _holds_mine(state: _State, mine_BC: Ints) -> Bools:
    """holds_BCR: rank R has a copy of what slot C of the fullest rank has (or is that rank, or that slot is empty)."""
    found = (mine_BC[:, :, None, None] == state.slots_BRC[:, None]).any(axis=3)
    holds: Bools = found | (mine_BC == EMPTY)[:, :, None]
    return holds


def _is_mine(state: _State, mine_BC: Ints) -> Bools:
    """is_BRC: the fullest rank has a copy of what is in a slot."""
    found = (state.slots_BRC[:, :, :, None] == mine_BC[:, None, None, :]).any(axis=3)
    is_mine: Bools = found & (state.slots_BRC != EMPTY)
    return is_mine


def _forbid(after_BCRC: Ints, by_rank_BCR: Bools, by_slot_BRC: Bools) -> Ints:
    after_BCRC[np.broadcast_to(by_rank_BCR[:, :, :, None] | by_slot_BRC[:, None], after_BCRC.shape)] = NEVER
    return after_BCRC
