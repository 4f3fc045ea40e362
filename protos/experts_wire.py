"""Between the plain types of ``experts`` and the messages that ranks, gateways and clients exchange."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from moestro.protos.experts import (
    ExpertsReport,
    LayerExperts,
    PlacementRequest,
    RankExperts,
    RebalanceDecision,
    RebalancerState,
)
from moestro.protos.gen import inference_pb2 as pb


def encode_report(report: ExpertsReport, group: str = "", epoch: int = 0) -> pb.GroupExperts:
    return pb.GroupExperts(
        group=group,
        epoch=epoch,
        architecture=report.architecture,
        num_experts=report.num_experts,
        slots_per_rank=report.slots_per_rank,
        window_seconds=report.window_s,
        layers=map(_encode_layer, report.layers),
        ranks=map(_encode_rank, report.ranks),
        rebalancer=pb.RebalancerState(
            enabled=report.rebalancer.enabled,
            activity=report.rebalancer.activity,
            moved_bytes=report.rebalancer.moved_bytes,
            switched_layers=report.rebalancer.switched_layers,
            undone_layers=report.rebalancer.undone_layers,
        ),
        decisions=map(_encode_decision, report.decisions),
    )


def decode_report(message: pb.GroupExperts) -> ExpertsReport:
    state = message.rebalancer
    return ExpertsReport(
        architecture=message.architecture,
        num_experts=message.num_experts,
        slots_per_rank=message.slots_per_rank,
        window_s=message.window_seconds,
        layers=tuple(
            LayerExperts(m.layer, tuple(m.load), by_rank(m.slots, message.slots_per_rank), tuple(m.rank_load))
            for m in message.layers
        ),
        ranks=tuple(
            RankExperts(
                m.rank, m.rows, m.expert_seconds, m.wait_seconds, m.step_seconds, m.steps, m.slowest_steps, m.tokens
            )
            for m in message.ranks
        ),
        rebalancer=RebalancerState(
            state.enabled, state.activity, state.moved_bytes, state.switched_layers, state.undone_layers
        ),
        decisions=tuple(map(_decode_decision, message.decisions)),
    )


def encode_placement(request: PlacementRequest, group: str = "") -> pb.SetPlacementRequest:
    """Of the three ways to name a placement at most one may be set."""
    message = pb.SetPlacementRequest(group=group, rebalance=request.rebalance, random_seed=request.random_seed)
    if request.even:
        message.even = True
    if request.layers is not None:
        message.experts.SetInParent()
        for slots in request.layers:
            message.experts.layers.add(slots=chain.from_iterable(slots))
    return message


def decode_placement(message: pb.SetPlacementRequest, slots_per_rank: int) -> PlacementRequest:
    """``slots_per_rank`` is the group's: the message has the slots in one row, rank after rank."""
    kind = message.WhichOneof("placement")
    return PlacementRequest(
        layers=tuple(by_rank(layer.slots, slots_per_rank) for layer in message.experts.layers)
        if kind == "experts"
        else None,
        random_seed=message.random_seed if kind == "random_seed" else None,
        even=message.even,
        rebalance=message.rebalance if message.HasField("rebalance") else None,
    )


def by_rank(slots: Sequence[int], slots_per_rank: int) -> tuple[tuple[int, ...], ...]:
    """One row of slots, rank after rank, cut into ranks."""
    flat = tuple(slots)
    return tuple(flat[start : start + slots_per_rank] for start in range(0, len(flat), slots_per_rank or 1))


def _encode_layer(layer: LayerExperts) -> pb.ExpertLayer:
    return pb.ExpertLayer(
        layer=layer.layer,
        load=layer.load,
        slots=chain.from_iterable(layer.slots),
        rank_load=layer.rank_load,
        balancedness=layer.balancedness,
    )


def _encode_rank(rank: RankExperts) -> pb.RankExperts:
    return pb.RankExperts(
        rank=rank.rank,
        rows=rank.rows,
        expert_seconds=rank.expert_s,
        wait_seconds=rank.wait_s,
        step_seconds=rank.step_s,
        steps=rank.num_steps,
        slowest_steps=rank.num_slowest,
        tokens=rank.tokens,
    )


def _encode_decision(decision: RebalanceDecision) -> pb.RebalanceDecision:
    return pb.RebalanceDecision(
        age_seconds=decision.age_s,
        trigger=decision.trigger,
        layers=decision.layers,
        reason=decision.reason,
        outcome=decision.outcome,
        bytes=decision.num_bytes,
        predicted_gain_seconds=decision.predicted_gain_s,
        predicted_cost_seconds=decision.predicted_cost_s,
        stall_seconds=decision.stall_s,
        realised_gain_seconds=decision.realised_gain_s,
        times=decision.times,
    )


def _decode_decision(m: pb.RebalanceDecision) -> RebalanceDecision:
    return RebalanceDecision(
        age_s=m.age_seconds,
        trigger=m.trigger,
        layers=tuple(m.layers),
        reason=m.reason,
        outcome=m.outcome,
        num_bytes=m.bytes,
        predicted_gain_s=m.predicted_gain_seconds,
        predicted_cost_s=m.predicted_cost_seconds,
        stall_s=m.stall_seconds,
        realised_gain_s=m.realised_gain_seconds if m.HasField("realised_gain_seconds") else None,
        times=m.times,
    )
