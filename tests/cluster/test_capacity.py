"""How much of a rank one gateway may use."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.backend import Capacity
from moestro.cluster.ranks.capacity import joint, rank_capacity
from moestro.protos.sequences import EngineLimits, EngineLoad

LIMITS = EngineLimits(100, 1000, 50, max_running=16, max_tokens=8000)


def load(running: int = 0, waiting: int = 0, used: int = 0, shedding: bool = False) -> EngineLoad:
    return EngineLoad(running, waiting, used, 500, is_shedding=shedding)


def test_one_gateway_has_the_rank_and_a_short_line() -> None:
    assert rank_capacity(LIMITS, load(), ours=0) == Capacity(16 + 2, 8000 + 1000)
    assert rank_capacity(LIMITS, load(10, 0, 400), ours=10) == Capacity(16 + 2, 8000 + 1000)
    assert rank_capacity(EngineLimits(100, 1000, 50, max_running=1), load(), ours=0).sequences == 2


def test_a_rank_where_somebody_waits_runs_all_it_can() -> None:
    assert rank_capacity(LIMITS, load(5, 3), ours=8).sequences == 5 + 2


def test_what_others_have_there_is_theirs_but_for_an_equal_share() -> None:
    assert rank_capacity(LIMITS, load(10, 0, 200), ours=6, gateways=2) == Capacity(18 - 4, 9000 - 3200 * 4 // 10)
    assert rank_capacity(LIMITS, load(16, 4, 500), ours=0, gateways=2) == Capacity(9, 4500)


def test_a_rank_that_sheds_takes_nothing_and_ranks_add_up() -> None:
    assert rank_capacity(LIMITS, load(shedding=True), ours=0) == Capacity(0, 0)
    assert joint([Capacity(1, 20), Capacity(2, 30)]) == Capacity(3, 50)
    assert joint([]) == Capacity(0, 0)


@settings(deadline=None)
@given(
    gateways=st.integers(1, 8),
    open_there=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    used=st.integers(0, 500),
)
def test_gateways_that_fill_their_capacity_never_ask_for_more_than_twice_the_rank(
    gateways: int, open_there: list[int], used: int
) -> None:
    """And whoever has less than an equal share may have at least that."""
    open_there = open_there[:gateways]
    total = sum(open_there)
    seen = load(min(total, 16), max(0, total - 16), used)
    for ours in open_there:
        capacity = rank_capacity(LIMITS, seen, ours, gateways)
        assert 18 // gateways <= capacity.sequences <= 18
        assert 9000 // gateways <= capacity.tokens <= 9000
        if ours >= 18 // gateways and total > 18:
            assert capacity.sequences <= max(ours, 18 // gateways)  # nobody who is over its share takes more
