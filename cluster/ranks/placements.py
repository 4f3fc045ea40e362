"""Whether an operator's placement fits a group. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.experts import ExpertsReport, LayerExperts, PlacementRequest
from moestro.protos.experts_wire import decode_placement
from moestro.protos.gen import inference_pb2 as pb

EMPTY = -1


def read_placement(message: pb.SetPlacementRequest, report: ExpertsReport) -> PlacementRequest:
    """The request as the group of ``report`` can carry it out. Raises InvalidRequest with the first thing wrong
    in every layer that does not fit: layer, rank and slot."""
    kind = message.WhichOneof("placement")
    if kind is not None and not report.layers:
        raise InvalidRequest([FieldViolation(kind, f"{report.architecture} has no mixture layers: nothing to place")])
    if kind == "experts" and (violations := list(_violations(message.experts, report))):
        raise InvalidRequest(violations)
    return decode_placement(message, report.slots_per_rank)


def _violations(placement: pb.ExpertPlacement, report: ExpertsReport) -> Iterator[FieldViolation]:
    if len(placement.layers) != len(report.layers):
        yield FieldViolation(
            "experts.layers", f"the model has {len(report.layers)} mixture layers, got {len(placement.layers)}"
        )
        return
    for index, (given, layer) in enumerate(zip(placement.layers, report.layers, strict=True)):
        if (wrong := _wrong_in(given.slots, layer, report)) is not None:
            yield FieldViolation(f"experts.layers[{index}].slots", f"layer {layer.layer}{wrong}")


def _wrong_in(slots: Sequence[int], layer: LayerExperts, report: ExpertsReport) -> str | None:
    num_ranks, per_rank = len(layer.slots), report.slots_per_rank
    if len(slots) != num_ranks * per_rank:
        return f": {num_ranks} ranks of {per_rank} slots are {num_ranks * per_rank}, got {len(slots)}"
    seen: dict[tuple[int, int], int] = {}  # rank and expert -> slot
    for number, expert in enumerate(slots):
        rank, slot = divmod(number, per_rank)
        where = f", rank {rank}, slot {slot}"
        if expert == EMPTY:
            continue
        if not 0 <= expert < report.num_experts:
            return f"{where}: expert must be in [0, {report.num_experts}), or {EMPTY} for none, got {expert}"
        if (other := seen.setdefault((rank, expert), slot)) != slot:
            return f"{where}: expert {expert} is on this rank already, in slot {other}"
    homeless = sorted(set(range(report.num_experts)) - set(slots))
    return f": no rank holds experts {homeless}" if homeless else None
