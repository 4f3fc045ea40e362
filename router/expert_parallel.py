"""How the experts of a model are spread over a group, as one of its ranks has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moestro.router.all_to_all import AllToAllTransport
from moestro.router.mesh import Mesh
from moestro.router.placement import Placement, spread
from moestro.router.transport import LocalTransport, Transport


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """What a model is built with. Where experts lie may change while it serves, layer by layer; the transport, the rank
    and the capacity do not."""

    transport: Transport[Any]
    placements: tuple[Placement, ...]  # by mixture layer; all of one capacity
    rank: int = 0


def over_group(mesh: Mesh, placements: tuple[Placement, ...]) -> ExpertParallel:
    """Experts over the ranks of ``mesh`` as ``placements`` say, by mixture layer."""
    if not placements:
        return all_here(0, 0)
    return ExpertParallel(AllToAllTransport(mesh.world, placements[0].capacity), placements, mesh.rank)


def all_here(num_experts: int, num_layers: int) -> ExpertParallel:
    """One rank that holds every expert of ``num_layers`` mixture layers."""
    placements = (spread(num_experts, 1),) * num_layers if num_layers else ()
    return ExpertParallel(LocalTransport(num_experts), placements)
