"""Where experts go from what ranks hold: what is read is the least that can be, and is spread evenly."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.random_placement import random_placement
from moestro.router.rehome import num_loads, rehome


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], int, int, list[int] | None]:
    """Any experts on any rank, in slots that may be empty, in any number; room for all of them."""
    num_experts, num_ranks = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    slots = st.lists(st.integers(EMPTY, num_experts - 1), max_size=num_experts + 2)
    held = draw(st.lists(slots, min_size=num_ranks, max_size=num_ranks))
    least = -(-num_experts // num_ranks)
    capacity = draw(st.integers(least, num_experts + 1))
    loads = draw(st.none() | st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts))
    return held, num_experts, capacity, loads


def fewest_loads(held: list[list[int]], num_experts: int, capacity: int) -> int:
    """By Hall's theorem in the form of Ore: what some set of experts lacks of slots where it is held."""
    holders = [{rank for rank, slots in enumerate(held) if expert in slots} for expert in range(num_experts)]
    lacking = 0
    for size in range(num_experts + 1):
        for experts in combinations(range(num_experts), size):
            ranks = set().union(*(holders[e] for e in experts)) if experts else set()
            lacking = max(lacking, size - capacity * len(ranks))
    return lacking


@settings(max_examples=300, deadline=None)
@given(problems())
def test_it_is_a_placement_that_reads_as_little_as_can_be(
    problem: tuple[list[list[int]], int, int, list[int] | None],
) -> None:
    held, num_experts, capacity, loads = problem
    placement = rehome(held, num_experts, capacity, loads)  # whose own checks say that every expert has a slot
    assert (placement.num_ranks, placement.capacity) == (len(held), capacity)
    assert sum(num_loads(held, placement)) == fewest_loads(held, num_experts, capacity)
    assert placement == rehome(held, num_experts, capacity, loads)
    for slots, wanted in zip(held, placement.slots, strict=True):
        for slot, expert in enumerate(wanted[: len(slots)]):
            stays = slots.index(expert) if expert in slots else None
            assert expert == EMPTY or stays is None or stays == slot or stays >= capacity
        if EMPTY in wanted:  # nothing that was there made room for nothing
            assert set(slots) - {EMPTY} <= set(wanted)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(0, 6), st.integers(0, 999))
def test_a_placement_that_fits_is_left_alone(num_experts: int, num_ranks: int, spare: int, seed: int) -> None:
    capacity = min(num_experts, -(-num_experts // num_ranks) + spare)
    placement = random_placement(num_experts, num_ranks, capacity, str(seed))
    assert rehome(placement.slots, num_experts, capacity) == placement


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(2, 8), st.data())
def test_a_rank_is_lost_and_comes_back_to_where_all_was(num_experts: int, num_ranks: int, data: st.DataObject) -> None:
    full = spread(num_experts, num_ranks)
    lost = data.draw(st.integers(0, num_ranks - 1))
    survivors = [slots for rank, slots in enumerate(full.slots) if rank != lost]
    shrunk = rehome(survivors, num_experts, -(-num_experts // (num_ranks - 1)))
    num_lost = len(set(full.slots[lost]) - {EMPTY})
    assert sum(num_loads(survivors, shrunk)) == num_lost
    sizes = [len(set(slots) - {EMPTY}) for slots in shrunk.slots]
    assert max(sizes) - min(sizes) <= 1
    grown = [*shrunk.slots[:lost], full.slots[lost], *shrunk.slots[lost:]]
    again = rehome(grown, num_experts, full.capacity)
    assert num_loads(grown, again) == (0,) * num_ranks


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_homeless_experts_are_dealt_out_by_load(num_ranks: int, loads: list[int]) -> None:
    """On empty ranks with room: no rank is heavier than the lightest by more than the last it was given."""
    placement = rehome([[]] * num_ranks, len(loads), len(loads), loads)
    weights = [[loads[e] + 1 for e in slots if e != EMPTY] for slots in placement.slots]
    lightest = min(map(sum, weights))
    for slots in weights:
        assert not slots or sum(slots) - min(slots) <= lightest


def test_an_expert_makes_room_by_going_to_its_other_holder() -> None:
    """Rank 0 is full with 0 and 1 and alone holds 2; rank 1 holds 1 too."""
    assert rehome([[0, 1, 2], [1]], 4, 2).slots == ((0, 2), (1, 3))


def test_replicas_stay_where_there_is_room_the_heaviest_first() -> None:
    """Rank 0 keeps 1 and has room for two of the others; 3 moves to a slot that rank 1 still has."""
    held = [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert rehome(held, 4, 3, [5, 9, 1, 1]).slots == ((0, 1, 2), (0, 3, 2))
    assert rehome(held, 4, 4) == Placement(4, ((0, 1, 2, 3), (0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("held", "capacity", "message"),
    [
        ([[0], [1]], 1, "capacity: 2 ranks of 1 slots cannot hold 3 experts"),
        ([[0], [3]], 2, r"held\[1\]: expert must be in \[0, 3\), got 3"),
    ],
)
def test_refusals(held: list[list[int]], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehome(held, 3, capacity)
