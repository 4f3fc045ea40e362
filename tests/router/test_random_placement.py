from hypothesis import given
from hypothesis import strategies as st

from moestro.router.placement import EMPTY
from moestro.router.random_placement import random_placement


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_every_spare_slot_holds_a_replica_where_one_is_of_use(experts: int, ranks: int, spare: int, seed: int) -> None:
    capacity = -(-experts // ranks) + spare
    placement = random_placement(experts, ranks, capacity, seed)  # a Placement checks itself
    assert placement.capacity == capacity
    assert placement == random_placement(experts, ranks, capacity, seed)
    for held in placement.slots:
        assert held.count(EMPTY) == max(0, capacity - experts)


def test_seeds_differ() -> None:
    assert len({random_placement(16, 4, 5, seed) for seed in range(20)}) == 20
