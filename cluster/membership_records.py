"""What a group's membership is told, what it decides, and what it keeps of each worker. Sans-IO, as `membership` is.

Times are seconds of the supervisor's clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moestro.router.parallel import GroupShape
from moestro.router.view import View
from moestro.workers.worker_state import WorkerPhase, WorkerState

EVEN_PATIENCE = 3.0  # when all hang at the same place nobody can be blamed, and a long step looks the same
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before the next try, after a worker that did not come to serve
PROBATION_S = 5.0  # who is lost so soon after it began to serve did not come to serve


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """The rules of one group."""

    shape: GroupShape  # at full strength
    min_ranks: int = 1  # with fewer it drains and is to be replaced as a whole
    replace: bool = True  # start a worker for each that was lost
    watchdog_s: float = 3.0  # how long a worker may keep quiet, and a turn may stand still
    join_s: float = 60.0  # how long the same of one that joins a view: it may be loading experts
    start_s: float = 600.0  # how long a worker may load


@dataclass(frozen=True, slots=True)
class Start:
    """A new process for a seat."""

    seat: int
    worker: int


@dataclass(frozen=True, slots=True)
class Form:
    """To be told to every member of the view."""

    view: View


@dataclass(frozen=True, slots=True)
class Kill:
    """To be fenced off so that it cannot come back, a stopped process too. Repeated while it still answers."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The group is to drain and to be replaced as a whole. Said once."""

    reason: str


Intent = Start | Form | Kill | GiveUp


@dataclass(slots=True)
class Tracked:
    """A worker as it is known here."""

    number: int
    seat: int
    heard_s: float  # its last sign of life
    moved_s: float  # when it was last seen to get on
    state: WorkerState = field(default_factory=lambda: WorkerState(WorkerPhase.LOADING))
    called_s: float = math.inf  # when it was called into the present view
    serving_since_s: float = math.inf  # the first time that a view with it was settled
    fault: str = ""  # why it is to be killed and takes part in nothing any more
    has_answered: bool = False

    @property
    def is_called(self) -> bool:
        """Into a view."""
        return self.called_s < math.inf

    @property
    def is_live(self) -> bool:
        return not self.fault

    @property
    def has_served(self) -> bool:
        return self.serving_since_s < math.inf

    def hear(self, state: WorkerState, now_s: float) -> None:
        """Takes in what it says of itself; ``in_step_since_s`` by the supervisor's clock."""
        before, self.state, self.heard_s, self.has_answered = self.state, state, now_s, True
        if _place(before) != _place(state):
            self.moved_s = now_s

    def serves(self, epoch: int) -> bool:
        return self.state.phase is WorkerPhase.SERVING and self.state.epoch == epoch

    def stands_still_s(self, now_s: float) -> float:
        """For how long a turn, or a view that it joins, has made no progress."""
        if self.state.phase is WorkerPhase.JOINING:
            return now_s - self.moved_s
        if self.state.phase is WorkerPhase.SERVING and self.state.in_step_since_s is not None:
            return now_s - max(self.moved_s, self.state.in_step_since_s)
        return 0.0


def _place(state: WorkerState) -> tuple[object, ...]:
    return state.phase, state.epoch, state.turns, state.progress


def fault_of(worker: Tracked, config: MembershipConfig, epoch: int, now_s: float) -> str:
    """Why a worker can no longer be counted on, as far as it shows in itself; empty when it can."""
    phase, silent_s = worker.state.phase, now_s - worker.heard_s
    loads = phase is WorkerPhase.LOADING  # its processor may be busy with that
    if phase in (WorkerPhase.FAILED, WorkerPhase.STOPPED):
        return worker.state.reason or f"it has {phase.value}"
    if worker.has_answered and silent_s > (config.join_s if loads else config.watchdog_s):
        return f"no answer for {silent_s:.1f} s"
    if loads and now_s - worker.moved_s > config.start_s:
        return f"not loaded after {config.start_s:.0f} s"
    # In a collective without a connection that breaks, it hears of the new view when its own time is up.
    if worker.is_called and worker.state.epoch < epoch and now_s - worker.called_s > 2 * config.watchdog_s:
        return f"it does not come to epoch {epoch}"
    return ""


def standstill(
    members: Sequence[Tracked], config: MembershipConfig, epoch: int, now_s: float
) -> tuple[list[Tracked], bool]:
    """Of the members of an epoch: who keeps the others waiting, and whether it has come to a standstill for which
    nobody can be blamed. In a collective those who wait have come further than the one they wait for."""
    here = [worker for worker in members if worker.state.epoch == epoch]
    if not here:
        return [], False
    least = min(worker.state.progress for worker in here)
    behind = [worker for worker in here if worker.state.progress == least]
    patience = EVEN_PATIENCE if len(behind) == len(here) else 1.0
    stuck = [worker for worker in here if worker.stands_still_s(now_s) > patience * _limit(worker, config)]
    if len(behind) == len(here):
        return [], bool(stuck)
    culprits = [worker for worker in behind if worker in stuck]
    asleep = all(worker.state.in_step_since_s is None for worker in behind)
    return culprits, bool(stuck) and not culprits and asleep


def _limit(worker: Tracked, config: MembershipConfig) -> float:
    return config.join_s if worker.state.phase is WorkerPhase.JOINING else config.watchdog_s


@dataclass(slots=True)
class TensorParallelSet:
    """The history of the seats of one set: when the next try may be made."""

    failures: int = 0  # in a row, of workers that did not come to serve
    not_before_s: float = -math.inf
    fault: str = ""  # of the last that was lost

    @property
    def pause_s(self) -> float:
        """From a loss to the next try."""
        return min(FIRST_PAUSE_S * 2 ** (self.failures - 1), LONGEST_PAUSE_S) if self.failures else 0.0

    def lost(self, worker: Tracked, now_s: float) -> None:
        served = now_s - worker.serving_since_s >= PROBATION_S
        self.failures = 0 if served else self.failures + 1
        self.not_before_s = now_s + self.pause_s
        self.fault = worker.fault


@dataclass(frozen=True, slots=True)
class RecoveryTotals:
    """Since the group began. A recovery runs from the notice of a loss until all that are left serve again; strength is
    full when every seat serves."""

    losses: int = 0  # members
    silent_s: float = 0.0  # from the last sign of life to the notice, over all losses
    recoveries: int = 0
    recovery_s: float = 0.0  # over all
    restorations: int = 0  # of full strength
    restoration_s: float = 0.0  # over all

    def lost(self, silent_s: float) -> RecoveryTotals:
        return replace(self, losses=self.losses + 1, silent_s=self.silent_s + silent_s)

    def recovered(self, took_s: float) -> RecoveryTotals:
        return replace(self, recoveries=self.recoveries + 1, recovery_s=self.recovery_s + took_s)

    def restored(self, took_s: float) -> RecoveryTotals:
        return replace(self, restorations=self.restorations + 1, restoration_s=self.restoration_s + took_s)
