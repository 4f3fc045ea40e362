"""The experts of a group from what its operator wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from moestro.protos.errors import ConfigError
from moestro.router.balance import balance
from moestro.router.balance_problem import Topology
from moestro.router.placement import Placement, spread
from moestro.router.placement_file import Shape, load_placements
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.messages import Ints
from moestro.router.rebalance.rebalancer import Rebalancer
from moestro.router.transports.choose import TransportKind
from moestro.workers.lockstep import Lockstep
from moestro.workers.model.decoder import Decoder
from moestro.workers.model_config import ModelConfig
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts
from moestro.workers.rebalancing.loader import OpenSource
from moestro.workers.rebalancing.reports import Reporter


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Where the experts of a group lie at its start, and how it may move them."""

    redundant: int = 0  # slots of the group beyond one for each expert, rounded up to equal ranks
    placement_file: str = ""  # to start from; empty: experts in order, one copy of each
    ranks_per_node: int = 0  # 0: all on one node
    transport: TransportKind | None = None  # None: each dispatch takes the kind that suits it
    rebalance: Config = field(default_factory=Config)


def topology(spec: ExpertsSpec, num_ranks: int) -> Topology:
    """Which ranks share a node: equally many neighbours."""
    return Topology.regular(num_ranks, spec.ranks_per_node or num_ranks)


def start_placements(spec: ExpertsSpec, model: ModelConfig, num_ranks: int) -> tuple[Placement, ...]:
    """By mixture layer; none for a dense model. Raises ConfigError for a file that does not fit."""
    if not model.num_moe_layers:
        return ()
    capacity = -(-(model.num_experts + spec.redundant) // num_ranks)
    if capacity > model.num_experts:
        raise ConfigError(
            f"experts.redundant: {spec.redundant} more slots than experts give each of {num_ranks} ranks {capacity} "
            f"slots; the model has {model.num_experts} experts, and no rank can use two copies of one"
        )
    if not spec.placement_file:
        return (spread(model.num_experts, num_ranks, capacity),) * model.num_moe_layers
    shape = Shape(model.architecture, model.num_moe_layers, model.num_experts, num_ranks, capacity)
    return load_placements(Path(spec.placement_file), shape)


def group_experts(
    spec: ExpertsSpec,
    model: Decoder,
    lockstep: Lockstep,
    *,
    rank: int,
    seats: tuple[int, ...],
    node_of_rank: tuple[int, ...],
    open_source: OpenSource,
) -> GroupExperts | NoExperts:
    """This rank's part in observing and moving the experts of its group. ``seats``: by rank."""
    banks = model.banks
    if not banks:
        return NoExperts(model.config.architecture)
    placements = tuple(bank.layout.placement for bank in banks.values())
    shape = next(iter(banks.values())).experts.shape
    rebalancer = Rebalancer(spec.rebalance, placements, shape.num_bytes)
    reporter = Reporter(model.config.architecture, tuple(banks), placements, seats, spec.rebalance.window_s)
    ranks = Topology(node_of_rank)
    solve = partial(_solve, ranks, placements[0].capacity, model.config.num_expert_groups)
    return GroupExperts(
        banks,
        lockstep,
        rank,
        seats,
        node_of_rank,
        rebalancer,
        solve,
        open_source,
        reporter,
        spec.rebalance.window_s,
        model.embedding.tp,
    )


def _solve(
    ranks: Topology,
    capacity: int,
    num_groups: int,
    loads_LE: Ints,
    previous: tuple[Placement, ...],
    slowness: tuple[float, ...],
) -> tuple[Placement, ...]:
    return balance(loads_LE, ranks, capacity, num_groups=num_groups, previous=previous, slowness=slowness)
