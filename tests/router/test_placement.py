import random

import pytest

from moestro.router.placement import EMPTY, Move, Placement, moves, moves_of_rank, spread


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 60, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 130])
def test_spread_places_every_expert_once_and_evenly(num_experts: int, num_ranks: int) -> None:
    placement = spread(num_experts, num_ranks)
    held = [[e for e in experts if e != EMPTY] for experts in placement.slots]
    assert sorted(e for experts in held for e in experts) == list(range(num_experts))
    assert len(held) == num_ranks
    assert placement.capacity == max(map(len, held)) <= min(map(len, held)) + 1


def test_spread_leaves_the_rest_of_a_larger_capacity_empty() -> None:
    assert spread(3, 2, 3).slots == ((0, EMPTY, EMPTY), (1, 2, EMPTY))
    with pytest.raises(ValueError, match="capacity must be at least 2 to hold 3 experts on 2 ranks, got 1"):
        spread(3, 2, 1)


def test_slot_numbers_run_over_ranks() -> None:
    placement = Placement(3, ((2, 0), (EMPTY, EMPTY), (0, 1)))
    assert (placement.num_ranks, placement.capacity, placement.num_slots) == (3, 2, 6)
    assert placement.slots_of_expert == ((1, 4), (5,), (0,))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (((0,), (2,)), r"slots\[1\]: expert must be in \[0, 2\), got 2"),
        (((0, 0), (1, EMPTY)), r"slots\[0\]: an expert is placed twice"),
        (((0,), (EMPTY,)), r"no rank holds experts \[1\]"),
        (((0, 1), (1,)), r"slots\[1\]: every rank has 2 slots, this one 1"),
    ],
)
def test_impossible_placements_are_refused(slots: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(2, slots)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 1), (1, 0), (-1, 2)])
def test_spread_names_the_bad_argument(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=r"num_(experts|ranks) must be at least 1, got"):
        spread(num_experts, num_ranks)


def test_moves_are_the_slots_to_be_loaded() -> None:
    old = Placement(4, ((0, 1, EMPTY), (2, 3, 0)))
    new = Placement(4, ((0, 3, 2), (EMPTY, 1, 0)))
    steps = moves(old, new)
    assert steps == (Move(0, 1, 3), Move(0, 2, 2), Move(1, 1, 1))
    assert moves_of_rank(steps, 2) == (2, 1)
    assert moves(old, old) == ()


def test_moves_turn_the_old_placement_into_the_new() -> None:
    rng = random.Random(0)
    for _ in range(50):
        old, new = (tuple(tuple(rng.sample(range(4), 4)) for _ in range(3)) for _ in range(2))
        slots = [list(experts) for experts in old]
        for move in moves(Placement(4, old), Placement(4, new)):
            assert slots[move.rank][move.slot] != move.expert
            slots[move.rank][move.slot] = move.expert
        assert tuple(map(tuple, slots)) == new


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (spread(3, 2), "num_experts: the new placement has 3, the old one 4"),
        (spread(4, 4), "num_ranks: the new placement has 4, the old one 2"),
        (spread(4, 2, 3), "capacity: the new placement has 3, the old one 2"),
    ],
)
def test_no_moves_lead_to_a_placement_of_another_shape(new: Placement, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moves(spread(4, 2), new)
