"""An operator's wish as the bytes that travel from the rank that was asked to all ranks of the group."""

from __future__ import annotations

import json
from dataclasses import asdict

from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.experts import PlacementRequest
from moestro.router.placement import Placement, spread
from moestro.router.random_placement import random_placement


def encode(request: PlacementRequest) -> bytes:
    return json.dumps(asdict(request)).encode()


def decode(data: bytes) -> PlacementRequest:
    fields = json.loads(data)
    if fields["layers"] is not None:
        fields["layers"] = tuple(tuple(tuple(slots) for slots in layer) for layer in fields["layers"])
    return PlacementRequest(**fields)


def wanted_placements(request: PlacementRequest, present: tuple[Placement, ...]) -> tuple[Placement, ...] | None:
    """The placements that a request asks for, None for none. Raises InvalidRequest when they do not fit the present
    ones: other layers, ranks, slots or experts, or no placement at all."""
    if request.even:
        return tuple(spread(p.num_experts, p.num_ranks, p.capacity) for p in present)
    if request.random_seed is not None:
        return tuple(
            random_placement(p.num_experts, p.num_ranks, p.capacity, f"{request.random_seed} {layer}")
            for layer, p in enumerate(present)
        )
    if request.layers is None:
        return None
    if len(request.layers) != len(present):
        raise _refused("experts.layers", f"must be {len(present)} mixture layers, are {len(request.layers)}")
    placements = []
    for layer, (slots, p) in enumerate(zip(request.layers, present, strict=True)):
        field = f"experts.layers[{layer}]"
        shape = [len(of_rank) for of_rank in slots]
        if shape != [p.capacity] * p.num_ranks:
            raise _refused(field, f"must be {p.num_ranks} ranks of {p.capacity} slots, are {shape}")
        try:
            placements.append(Placement(p.num_experts, slots))
        except ValueError as error:
            raise _refused(field, str(error)) from None
    return tuple(placements)


def _refused(field: str, reason: str) -> InvalidRequest:
    return InvalidRequest([FieldViolation(field, reason)])
