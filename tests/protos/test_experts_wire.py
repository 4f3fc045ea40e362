"""Reports and placement requests survive the wire, whatever they hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.protos.experts import (
    ExpertsReport,
    LayerExperts,
    PlacementRequest,
    RankExperts,
    RebalanceDecision,
    RebalancerState,
)
from moestro.protos.experts_wire import decode_placement, decode_report, encode_placement, encode_report
from moestro.protos.gen import inference_pb2 as pb

COUNT = st.integers(0, 2**40)
SMALL = st.integers(0, 100)
TIME = st.floats(0, 1e6)
SLOT = st.integers(-1, 500)


@st.composite
def reports(draw: st.DrawFn) -> ExpertsReport:
    num_experts, num_ranks, per_rank = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rank_slots = st.tuples(*[st.tuples(*[SLOT] * per_rank)] * num_ranks)
    layers = st.builds(
        LayerExperts,
        SMALL,
        st.tuples(*[COUNT] * num_experts),
        rank_slots,
        st.tuples(*[COUNT] * num_ranks),
    )
    decisions = st.builds(
        RebalanceDecision,
        TIME,
        st.sampled_from(["auto", "operator", "undo"]),
        st.lists(SMALL, max_size=4).map(tuple),
        st.text(max_size=20),
        st.sampled_from(["refused", "loading", "settling", "kept", "undone", "cancelled"]),
        COUNT,
        TIME,
        TIME,
        TIME,
        st.none() | st.floats(-1e6, 1e6),
        st.integers(1, 9),
    )
    return ExpertsReport(
        draw(st.text(max_size=10)),
        num_experts,
        per_rank,
        draw(TIME),
        tuple(draw(st.lists(layers, max_size=3))),
        tuple(draw(st.lists(st.builds(RankExperts, SMALL, COUNT, TIME, TIME, TIME, COUNT, COUNT, COUNT), max_size=3))),
        draw(st.builds(RebalancerState, st.booleans(), st.text(max_size=10), COUNT, COUNT, COUNT)),
        tuple(draw(st.lists(decisions, max_size=3))),
    )


@given(reports())
@settings(max_examples=60)
def test_a_report_comes_back_as_it_was(report: ExpertsReport) -> None:
    message = pb.GroupExperts.FromString(encode_report(report, "g", 4).SerializeToString())
    assert decode_report(message) == report
    assert (message.group, message.epoch) == ("g", 4)
    assert [layer.balancedness for layer in message.layers] == [layer.balancedness for layer in report.layers]


PLACEMENTS = st.one_of(
    st.builds(PlacementRequest, rebalance=st.none() | st.booleans()),
    st.builds(PlacementRequest, even=st.just(True), rebalance=st.none() | st.booleans()),
    st.builds(PlacementRequest, random_seed=st.integers(0, 2**64 - 1), rebalance=st.none() | st.booleans()),
    st.lists(st.tuples(st.tuples(SLOT, SLOT, SLOT), st.tuples(SLOT, SLOT, SLOT)), max_size=4).map(
        lambda layers: PlacementRequest(layers=tuple(layers))
    ),
)


@given(PLACEMENTS)
@settings(max_examples=60)
def test_a_placement_request_comes_back_as_it_was(request: PlacementRequest) -> None:
    message = pb.SetPlacementRequest.FromString(encode_placement(request, "g").SerializeToString())
    assert decode_placement(message, slots_per_rank=3) == request
    assert message.group == "g"


def test_an_absent_gain_is_not_a_gain_of_zero() -> None:
    decision = RebalanceDecision(1.0, "load", (), "", "kept", realised_gain_s=0.0)
    report = ExpertsReport("", 1, 1, 0.0, (), (), decisions=(decision, RebalanceDecision(2.0, "load", (), "", "kept")))
    assert [d.realised_gain_s for d in decode_report(encode_report(report)).decisions] == [0.0, None]
