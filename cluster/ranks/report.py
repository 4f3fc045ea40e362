"""What a rank's process says of itself to its group's supervisor, and what it is told when it starts. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moestro.workers.worker_state import WorkerPhase, WorkerState

if TYPE_CHECKING:
    from moestro.router.mesh import StoreAddress

WATCH_S = 0.5  # a watch answers at least so often, and so is a sign of life


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank's process stands: its group, its seat and number there, and how the group's members meet.

    ``held``: by mixture layer the logical experts to load, None for those of the seat at full strength. ``gently``: it
    loads beside a group that serves, a little behind it."""

    group: str
    seat: int
    worker: int
    tp: int
    store: StoreAddress
    host: str  # that it listens on and is reached at
    secret: str
    held: tuple[tuple[int, ...], ...] | None = None
    gently: bool = False

    @property
    def name(self) -> str:
        return f"{self.group} rank {self.seat}"

    @property
    def leads(self) -> bool:
        """Whether it talks to gateways: the first of its tensor-parallel set does."""
        return self.seat % self.tp == 0


@dataclass(frozen=True, slots=True)
class RankReport:
    """A snapshot. ``step_age_s`` is for how long the turn that now runs has lasted, None between turns: clocks of two
    processes cannot be compared."""

    version: int
    state: WorkerState
    step_age_s: float | None = None
    address: str = ""  # of its server, once it is open
    loaded_bytes: int = 0
    total_bytes: int = 0
    device: str = ""
    resident_bytes: int = 0


UNHEARD = RankReport(-1, WorkerState(WorkerPhase.LOADING))
