"""How many experts a rank's memory holds, and how many ranks a group can lose."""

from __future__ import annotations

import pytest

from moestro.protos.errors import ExpertsDoNotFit
from moestro.workers.memory_plan import MemoryPlan, capacity_of, spare_ranks


def test_slots_are_what_fits_beside_everything_else() -> None:
    assert MemoryPlan(limit=1000, fixed=400, slot=100).slots == 6
    assert MemoryPlan(limit=999, fixed=400, slot=100).slots == 5
    assert MemoryPlan(limit=300, fixed=400, slot=100).slots == 0
    assert MemoryPlan(limit=300, fixed=400, slot=0).slots == 0


@pytest.mark.parametrize(
    ("redundant", "num_ranks", "most_slots", "capacity"),
    [(0, 4, 64, 16), (0, 3, 64, 22), (8, 4, 64, 18), (8, 3, 23, 23), (8, 3, 22, 22), (64, 1, 99, 64)],
)
def test_capacity(redundant: int, num_ranks: int, most_slots: int, capacity: int) -> None:
    assert capacity_of(64, redundant, num_ranks, most_slots) == capacity


def test_too_few_ranks_are_refused_with_the_numbers() -> None:
    with pytest.raises(ExpertsDoNotFit, match=r"3 ranks are too few for 64 experts .* hold 22, and has memory for 21"):
        capacity_of(64, 8, 3, 21)


@pytest.mark.parametrize(
    ("num_ranks", "tp", "most_slots", "spare"),
    [(4, 1, 64, 3), (4, 1, 32, 2), (4, 1, 22, 1), (4, 1, 21, 0), (4, 2, 32, 2), (4, 2, 31, 0), (4, 4, 16, 0)],
)
def test_spare_ranks(num_ranks: int, tp: int, most_slots: int, spare: int) -> None:
    """Of 64 experts. As many ranks can be lost as ``capacity_of`` then accepts, in whole sets."""
    assert spare_ranks(64, num_ranks, tp, most_slots) == spare
    capacity_of(64, 0, num_ranks - spare, most_slots)
    if num_ranks - spare > tp:
        with pytest.raises(ExpertsDoNotFit):
            capacity_of(64, 0, num_ranks - spare - tp, most_slots)


def test_a_dense_model_needs_one_set() -> None:
    assert spare_ranks(0, 6, 2, 0) == 4
