"""An operator's wish as the bytes that travel from the rank that was asked to all ranks of the group."""

from __future__ import annotations

import json
from dataclasses import asdict

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
    """The placements that a request asks for, None for none. Raises ValueError when they cannot take the place of the
    present ones: other layers, ranks, slots or experts, or no placement at all. (Who speaks to operators has checked
    that before, and can name the field.)"""
    if request.even:
        return tuple(spread(p.num_experts, p.num_ranks, p.capacity) for p in present)
    if request.random_seed is not None:
        return tuple(
            random_placement(p.num_experts, p.num_ranks, p.capacity, f"{request.random_seed} {layer}")
            for layer, p in enumerate(present)
        )
    if request.layers is None:
        return None
    placements = tuple(Placement(p.num_experts, slots) for p, slots in zip(present, request.layers, strict=True))
    for layer, (new, old) in enumerate(zip(placements, present, strict=True)):
        if (new.num_ranks, new.capacity) != (old.num_ranks, old.capacity):
            raise ValueError(
                f"layers[{layer}]: must be {old.num_ranks} ranks of {old.capacity} slots, is {new.num_ranks} of "
                f"{new.capacity}"
            )
    return placements
