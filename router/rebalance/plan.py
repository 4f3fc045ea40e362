"""A plan, and where a rebalancer is with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moestro.router.placement import Placement
from moestro.router.rebalance.fit import Line
from moestro.router.rebalance.ledger import Trigger
from moestro.router.rebalance.messages import Observation
from moestro.router.rebalance.tables import Tables


@dataclass(slots=True)
class Plan:
    trigger: Trigger
    reason: str
    placements: tuple[Placement, ...]
    tables: Tables  # of these placements
    since: float  # traffic from then on has had no part in making it
    forced: bool  # carried out whether it pays or not, and not judged afterwards
    hope: float = 0.0  # fraction of the step time that made the machine ask for it
    queue: list[int] = field(default_factory=list)  # layers still to move, best first
    moved: list[int] = field(default_factory=list)
    before: Line | None = None  # step time before it began


@dataclass(slots=True)
class Job:
    """A layer that loads."""

    ticket: int
    layer: int
    entry: int  # of the ledger
    rate: float  # seconds saved per second that it promised
    cost_s: float
    quiet: Line | None  # step time before, if that still says how long steps take without loading
    ready: bool = False
    steps: int = 0  # while it loaded; so the rest
    tokens: int = 0
    steps_s: float = 0.0
    loaded_bytes: int = 0  # by the rank that loaded most

    def add(self, seen: Observation) -> None:
        self.steps += seen.steps
        self.tokens += int(seen.tokens_R.sum())
        self.steps_s += float(seen.steps_s_R.max())
        self.loaded_bytes += int(seen.loaded_bytes_R.max())


@dataclass(frozen=True, slots=True)
class Idle:
    until: float  # no decision before


@dataclass(frozen=True, slots=True)
class Solving:
    ticket: int
    since: float
    hope: float  # fraction of the step time that even loads would save


@dataclass(frozen=True, slots=True)
class Trying:
    plan: Plan


@dataclass(frozen=True, slots=True)
class Moving:
    plan: Plan
    job: Job


@dataclass(frozen=True, slots=True)
class Settling:
    plan: Plan
    since: float


Phase = Idle | Solving | Trying | Moving | Settling
