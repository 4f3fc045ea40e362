import pytest

from moestro.router.placement import Placement, spread


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 60, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 130])
def test_spread_places_every_expert_once_and_evenly(num_experts: int, num_ranks: int) -> None:
    placement = spread(num_experts, num_ranks)
    assert sorted(e for experts in placement.slots for e in experts) == list(range(num_experts))
    sizes = [len(experts) for experts in placement.slots]
    assert len(sizes) == num_ranks
    assert max(sizes) - min(sizes) <= 1


def test_slot_numbers_run_over_ranks() -> None:
    placement = Placement(3, ((2, 0), (), (0, 1)))
    assert placement.num_slots == 4
    assert placement.rank_of_slot == (0, 0, 2, 2)
    assert placement.slots_of_expert == ((1, 2), (3,), (0,))
    assert [placement.first_slot(rank) for rank in range(4)] == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (((0,), (2,)), r"slots\[1\]: expert must be in \[0, 2\), got 2"),
        (((0, 0), (1,)), r"slots\[0\]: an expert is placed twice"),
        (((0,), ()), r"no rank holds experts \[1\]"),
    ],
)
def test_impossible_placements_are_refused(slots: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(2, slots)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 1), (1, 0), (-1, 2)])
def test_spread_names_the_bad_argument(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=r"num_(experts|ranks) must be at least 1, got"):
        spread(num_experts, num_ranks)
