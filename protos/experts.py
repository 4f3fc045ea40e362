"""What a group knows of its experts, as plain frozen data: the report that operators read. Times are seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One mixture layer over the window."""

    layer: int  # of the decoder
    load: tuple[int, ...]  # rows by logical expert
    slots: tuple[tuple[int, ...], ...]  # by rank and slot: the logical expert, -1 for none
    rank_load: tuple[int, ...]  # rows by rank

    @property
    def balancedness(self) -> float:
        """Mean over maximum of the ranks' rows; 1 without any."""
        most = max(self.rank_load)
        return sum(self.rank_load) / (len(self.rank_load) * most) if most else 1.0


@dataclass(frozen=True, slots=True)
class RankExperts:
    """One rank over the window."""

    rank: int  # its seat: what operators call it, whoever else is there
    rows: int
    expert_s: float  # in expert products
    wait_s: float  # for rows of other ranks, and for results
    step_s: float  # in steps, all of them
    num_steps: int
    num_slowest: int  # steps in which it waited least: the others waited for it
    tokens: int = 0  # of its own sequences, put through the model


@dataclass(frozen=True, slots=True)
class RebalanceDecision:
    """One decision of the rebalancer, carried out or not."""

    age_s: float
    trigger: str  # auto, operator, undo
    layers: tuple[int, ...]  # of the decoder
    reason: str
    outcome: str  # refused, loading, settling, kept, undone, cancelled
    num_bytes: int = 0  # to be loaded by the rank that loads most
    predicted_gain_s: float = 0.0  # over the horizon
    predicted_cost_s: float = 0.0
    stall_s: float = 0.0  # measured at the switch
    realised_gain_s: float | None = None  # over the horizon, once measured
    times: int = 1  # how often the same was decided in a row


@dataclass(frozen=True, slots=True)
class RebalancerState:
    """What the rebalancer is doing, and what it has done since the start."""

    enabled: bool = False
    activity: str = "off"
    moved_bytes: int = 0
    switched_layers: int = 0
    undone_layers: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsReport:
    """All of a group, the same on each of its ranks."""

    architecture: str
    num_experts: int
    slots_per_rank: int
    window_s: float
    layers: tuple[LayerExperts, ...]
    ranks: tuple[RankExperts, ...]
    rebalancer: RebalancerState = RebalancerState()
    decisions: tuple[RebalanceDecision, ...] = ()  # oldest first


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """An operator's wish. At most one of the first three."""

    layers: tuple[tuple[tuple[int, ...], ...], ...] | None = None  # by mixture layer, rank, slot
    random_seed: int | None = None
    even: bool = False
    rebalance: bool | None = None  # turns automatic rebalancing on or off
