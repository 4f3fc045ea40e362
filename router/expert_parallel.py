"""How the experts of a model are spread over a group, as one of its ranks has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moestro.router.board import NoBoard
from moestro.router.mesh import Mesh
from moestro.router.placement import Placement, spread
from moestro.router.transport import LocalTransport, Transport
from moestro.router.transports import deep_ep
from moestro.router.transports.all_to_all import AllToAllTransport
from moestro.router.transports.by_call import ByCallTransport
from moestro.router.transports.choose import Deployment, TransportKind
from moestro.router.transports.fixed_capacity import FixedCapacityTransport
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.router.transports.shared_memory import SharedMemoryTransport


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """What a model is built with. Where experts lie may change while it serves, layer by layer; the transport, the rank
    and the capacity do not."""

    transport: Transport[Any]
    placements: tuple[Placement, ...]  # by mixture layer; all of one capacity
    rank: int = 0
    node_of_rank: tuple[int, ...] | None = None  # None: all ranks are on one node


def over_group(
    mesh: Mesh,
    placements: tuple[Placement, ...],
    *,
    node_of_rank: tuple[int, ...] | None = None,
    transport: TransportKind | None = None,
    captured_tokens: int = 0,
    two_batches_from: int | None = None,
    deep_ep_tokens: int = 0,
) -> ExpertParallel:
    """Experts over the ranks of ``mesh`` as ``placements`` say, by mixture layer. Without ``transport`` each dispatch
    takes the kind that suits it. ``two_batches_from`` is the number of tokens of the busiest rank from which a layer is
    computed in two halves, ``deep_ep_tokens`` the most that a rank dispatches at once through DeepEP,
    ``captured_tokens`` the number up to which any rank may have captured the step.

    Raises ConfigError, at the first dispatch, when the transport that was asked for cannot serve."""
    if not placements:
        return all_here(0, 0)
    deployment = Deployment(
        device="cuda" if mesh.device.type == "cuda" else "cpu",
        backends=frozenset({"gloo"} | ({"nccl"} if dist.is_nccl_available() else set())),
        captured_tokens=captured_tokens,
        board_bytes=0 if isinstance(mesh.board, NoBoard) else mesh.board.part_bytes,
        no_board=mesh.board.reason if isinstance(mesh.board, NoBoard) else "",
        deep_ep=deep_ep.is_installed(),
        deep_ep_tokens=deep_ep_tokens,
        asked_for=transport,
        two_batches_from=two_batches_from,
    )
    return ExpertParallel(transport_over(mesh, deployment, placements[0].capacity), placements, mesh.rank, node_of_rank)


def transport_over(mesh: Mesh, deployment: Deployment, capacity: int) -> ByCallTransport:
    """Every kind that can be had over ``mesh``, for ranks of ``capacity`` slots."""
    transports: dict[TransportKind, Transport[Any]] = {
        "local": LocalTransport(capacity),
        "gather_scatter": GatherScatterTransport(mesh.world, capacity),
        "all_to_all": AllToAllTransport(mesh.world, capacity),
        "fixed_capacity": FixedCapacityTransport(mesh.world, capacity),
    }
    if not isinstance(mesh.board, NoBoard):
        transports["shared_memory"] = SharedMemoryTransport(mesh.board, capacity)
    if deployment.asked_for == "deep_ep" and deployment.deep_ep:
        transports["deep_ep"] = deep_ep.DeepEPTransport(mesh.control, capacity, deployment.deep_ep_tokens)
    return ByCallTransport(transports, deployment, capacity)


def all_here(num_experts: int, num_layers: int) -> ExpertParallel:
    """One rank that holds every expert of ``num_layers`` mixture layers."""
    placements = (spread(num_experts, 1),) * num_layers if num_layers else ()
    return ExpertParallel(LocalTransport(num_experts), placements)
