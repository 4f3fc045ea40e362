"""The words of admission: what a request asks for, and what becomes of it. Times are seconds of one clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from moestro.cluster.edge.estimates import Histogram
from moestro.cluster.edge.fair_queue import Waiting
from moestro.protos.errors import Overloaded

QUEUE_BOUNDS_S = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)


class Refusal(Enum):
    """Why a request was not started."""

    OPEN = "open"  # too many are open, started or not
    FULL = "full"  # the line is full
    WAIT = "wait"  # it would have to wait too long
    DEADLINE = "deadline"  # its own deadline cannot be met
    MEMORY = "memory"  # memory runs short


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of the line."""

    max_queued: int = 1024  # requests
    max_queued_tokens: int = 0  # prompt and expected output; 0: as many as the backend can hold
    max_queue_s: float = 30.0
    quantum: int = 512  # tokens a client may start in its turn


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants."""

    client: str
    prompt_tokens: int
    max_tokens: int  # per choice
    choices: int = 1
    priority: int = 0
    deadline_s: float = inf


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was let in: it waits, then it is started, then it is over."""

    ask: Ask
    place: Waiting
    output_tokens: int  # expected, per choice
    arrived_s: float
    start_by_s: float
    started_s: float | None = None
    refusal: Overloaded | None = None  # of one that was given up
    is_over: bool = False

    @property
    def cost(self) -> int:
        return self.place.cost


@dataclass(slots=True)
class AdmissionCounts:
    """For metrics; since the start."""

    refused: Counter[Refusal] = field(default_factory=Counter)
    queue_s: Histogram = field(default_factory=lambda: Histogram(QUEUE_BOUNDS_S))  # of those that started
