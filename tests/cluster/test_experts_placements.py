"""Which placements fit a group, judged by the router's own definition of a placement."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.ranks.placements import read_placement
from moestro.protos.errors import InvalidRequest
from moestro.protos.experts import ExpertsReport, LayerExperts, PlacementRequest
from moestro.protos.experts_wire import encode_placement
from moestro.router.placement import Placement

RANKS, SLOTS, EXPERTS = 2, 3, 4
EVEN = ((0, 1, -1), (2, 3, -1))
REPORT = ExpertsReport("Mix", EXPERTS, SLOTS, 1.0, tuple(LayerExperts(i, (0,) * 4, EVEN, (0, 0)) for i in (1, 3)), ())


def is_placement(slots: tuple[tuple[int, ...], ...]) -> bool:
    try:
        placement = Placement(EXPERTS, slots)
    except (ValueError, IndexError):
        return False
    return (placement.num_ranks, placement.capacity) == (RANKS, SLOTS)


# Mostly near a placement: one that fits, with a few slots changed.
@st.composite
def near_placements(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    flat = draw(st.permutations([0, 1, 2, 3, -1, -1]))
    for slot in draw(st.lists(st.integers(0, 5), max_size=2)):
        flat[slot] = draw(st.integers(-2, EXPERTS))
    return tuple(flat[:SLOTS]), tuple(flat[SLOTS:])


@given(near_placements())
@settings(max_examples=300)
def test_what_fits_is_what_the_router_calls_a_placement(slots: tuple[tuple[int, ...], ...]) -> None:
    request = PlacementRequest(layers=(EVEN, slots))
    if is_placement(slots):
        assert read_placement(encode_placement(request), REPORT) == request
        return
    with pytest.raises(InvalidRequest) as error:
        read_placement(encode_placement(request), REPORT)
    (violation,) = error.value.violations
    assert violation.field == "experts.layers[1].slots"
    assert violation.description.startswith("layer 3")


def test_every_layer_that_does_not_fit_is_named() -> None:
    request = PlacementRequest(layers=(((0, 0, 1), (2, 3, -1)), ((0, 1, 2), (3,))))
    with pytest.raises(InvalidRequest) as error:
        read_placement(encode_placement(request), REPORT)
    assert [v.description for v in error.value.violations] == [
        "layer 1, rank 0, slot 1: expert 0 is on this rank already, in slot 0",
        "layer 3: 2 ranks of 3 slots are 6, got 4",
    ]
