"""Who makes up a group: from what is heard of its workers to the next view. Sans-IO; the supervisor carries it out.

    begin ──▶ Start every seat ──all ready──▶ Form epoch e ──▶ all serve ("settled")
                                                                │
      ┌──────────── a member is lost, or the epoch broke ◀──────┤
      ▼                                                         │
    Kill (fence) ──▶ Form epoch e+1 from who is left ──▶ settled ──▶ Start what is missing ──▶ ready ──▶ Form e+2

A member is lost when its process has ended, when it failed of its own fault, when it keeps quiet for longer than the
watchdog, when it keeps the others waiting in a collective for so long, or when it does not come to a view. With it goes
its tensor-parallel set. A view that breaks though nobody is lost is formed again from the same members, once each has
shown that it lives. Nothing is started while a view forms: the survivors serve first.

Every input is a fact with its time; the answer is what is to be done now.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from moestro.cluster.membership_records import (
    Form,
    GiveUp,
    Intent,
    Kill,
    MembershipConfig,
    RecoveryTotals,
    Start,
    TensorParallelSet,
    Tracked,
    fault_of,
    standstill,
)
from moestro.router.view import Member, View
from moestro.workers.worker_state import WorkerPhase, WorkerState

STANDSTILL_S = 1.0  # a supervisor that did nothing for so long stood still itself
FIRST_RETRY_S = 0.1  # before a view that did not come about is formed again; doubles
BLAME_NEWCOMERS, MOST_TRIES = 3, 8  # views in a row that did not come about though nobody was lost


class Membership:
    """The membership of one group. ``epoch`` is that of its first view."""

    def __init__(self, config: MembershipConfig, epoch: int) -> None:
        self.config = config
        self.view: View | None = None
        self.given_up = ""  # why
        self.totals = RecoveryTotals()
        self._next_epoch = epoch
        self._next_worker = 0
        self._workers: dict[int, Tracked] = {}
        self._sets = [TensorParallelSet() for _ in range(config.shape.dp)]
        self._needed = 1  # ranks without which the experts do not fit
        self._draining = False
        self._has_settled = False
        self._broke_s = math.inf  # when the present view was found broken with all its members there
        self._tries = 0  # views since one was settled
        self._now_s = -math.inf
        self._lost_s: float | None = None  # the first loss from which the group has not recovered
        self._weak_s: float | None = None  # the first since it was at full strength

    def begin(self, now_s: float) -> list[Intent]:
        """Starts the group. Once, before everything else."""
        self._now_s = now_s
        return [start for number in range(self.config.shape.dp) for start in self._start_set(number, now_s)]

    def told(self, worker: int, state: WorkerState, now_s: float) -> list[Intent]:
        """A worker answered; ``in_step_since_s`` by the clock of ``now_s``."""
        self._advance(now_s)
        known = self._workers.get(worker)
        if known is None or known.fault:  # it comes back from the dead
            return [Kill(worker, known.fault if known else "its epoch is over"), *self._decide(now_s)]
        known.hear(state, now_s)
        return self._decide(now_s)

    def died(self, worker: int, reason: str, now_s: float) -> list[Intent]:
        """Its process is gone. Idempotent."""
        self._advance(now_s)
        known = self._workers.pop(worker, None)
        if known is None:
            return []
        return [*self._lose(known, reason, now_s), *self._decide(now_s)]

    def tick(self, now_s: float) -> list[Intent]:
        """Time has passed; several times a second."""
        self._advance(now_s)
        return self._decide(now_s)

    def needs(self, ranks: int) -> None:
        """With fewer ranks the experts do not fit."""
        self._needed = max(1, ranks)

    def drain(self) -> None:
        """Takes nobody in any more; who is lost is still cut off from the others."""
        self._draining = True

    @property
    def is_settled(self) -> bool:
        """Whether every member of the view serves in it."""
        return self.view is not None and all(self._serves(member, self.view.epoch) for member in self.view.members)

    @property
    def spare_ranks(self) -> int:
        """How many more could be lost before the experts no longer fit."""
        return max(0, len(self.view.members) - self._needed) if self.view is not None else 0

    def worker_at(self, seat: int) -> Tracked | None:
        """The worker in a seat that has not been lost."""
        return next((worker for worker in self._live() if worker.seat == seat), None)

    def history(self, seat: int) -> TensorParallelSet:
        """What became of earlier workers there."""
        return self._sets[seat // self.config.shape.tp]

    @property
    def is_leaving(self) -> bool:
        """Whether it takes nobody in any more."""
        return self._draining or bool(self.given_up)

    def members(self) -> list[Tracked]:
        """Of the present view, those that are left."""
        numbers = {member.worker for member in self.view.members} if self.view is not None else set()
        return [worker for worker in self._live() if worker.number in numbers]

    def _live(self) -> Iterator[Tracked]:
        return (worker for worker in self._workers.values() if worker.is_live)

    def _serves(self, member: Member, epoch: int) -> bool:
        worker = self._workers.get(member.worker)
        return worker is not None and worker.is_live and worker.serves(epoch)

    def _advance(self, now_s: float) -> None:
        """Time in which the supervisor itself stood still is nobody's fault."""
        gap_s = now_s - self._now_s
        if gap_s > STANDSTILL_S:
            for worker in self._workers.values():
                worker.heard_s += gap_s
                worker.moved_s += gap_s
                worker.called_s += gap_s
        self._now_s = now_s

    def _decide(self, now_s: float) -> list[Intent]:
        intents = [*self._condemn(now_s), *self._regroup(now_s)]
        if self.is_settled:
            self._settle(now_s)
            intents += self._replace(now_s)
        return intents

    def _condemn(self, now_s: float) -> Iterator[Intent]:
        """Those that cannot be counted on any more."""
        epoch = self.view.epoch if self.view is not None else 0
        for worker in list(self._live()):
            if fault := fault_of(worker, self.config, epoch, now_s):
                yield from self._kill(worker, fault, now_s)
        members = self.members()
        culprits, even = standstill(members, self.config, epoch, now_s)
        for worker in culprits:
            yield from self._kill(worker, f"the others wait for it in epoch {epoch}", now_s)
        if even or any(w.state.phase is WorkerPhase.BROKEN and w.state.epoch == epoch for w in members):
            self._broke_s = min(self._broke_s, now_s)
        newcomers = [worker for worker in members if not worker.has_served]
        if self._tries >= BLAME_NEWCOMERS and self._broke_s < math.inf and len(newcomers) < len(members):
            for worker in newcomers:
                yield from self._kill(worker, f"{self._tries} views with it did not come about", now_s)

    def _kill(self, worker: Tracked, reason: str, now_s: float) -> Iterator[Intent]:
        if worker.is_live:
            yield Kill(worker.number, reason)
            yield from self._lose(worker, reason, now_s)

    def _lose(self, worker: Tracked, reason: str, now_s: float) -> Iterator[Intent]:
        """Takes a worker out of everything, and with it what is left of its tensor-parallel set."""
        if not worker.is_live:
            return
        worker.fault = reason
        self._sets[self._set_of(worker)].lost(worker, now_s)
        if worker.has_served:
            self.totals = self.totals.lost(now_s - worker.heard_s)
            self._lost_s = now_s if self._lost_s is None else self._lost_s
            self._weak_s = now_s if self._weak_s is None else self._weak_s
        for peer in list(self._live()):
            if self._set_of(peer) == self._set_of(worker):
                peer.fault = f"its tensor-parallel peer in seat {worker.seat} was lost"
                yield Kill(peer.number, peer.fault)
        if not self._has_settled:  # what fails at the start fails again: who waits for the group should hear why
            yield from self._give_up(reason)

    def _regroup(self, now_s: float) -> Iterator[Intent]:
        """The next view, when there has to be one."""
        if self.view is None:
            if not self.given_up and len(self._ready()) == self.config.shape.world_size:
                yield self._form(now_s)
            return
        members = self.members()
        if len(members) < len(self.view.members):
            fewest, size = max(self._needed, self.config.min_ranks), self.config.shape.world_size
            if len(members) < fewest:
                yield from self._give_up(f"{len(members)} of {size} ranks are left, and {fewest} are needed")
            if len(members) >= self._needed:
                yield self._form(now_s)
        elif self._broke_s < math.inf:
            pause_s = FIRST_RETRY_S * 2 ** (self._tries - 1) if self._tries else 0.0
            if self._tries >= MOST_TRIES:
                reasons = [worker.state.reason for worker in members if worker.state.reason]
                yield from self._give_up(f"{self._tries} views did not come about: {'; '.join(reasons[:1])}")
            elif all(worker.heard_s >= self._broke_s for worker in members) and now_s >= self._broke_s + pause_s:
                yield self._form(now_s)
        elif self.is_settled and self._ready() and not self.is_leaving:
            yield self._form(now_s)

    def _form(self, now_s: float) -> Form:
        takes_in = not self.is_leaving
        inside = [*self.members(), *(self._ready() if takes_in else ())]
        members = sorted(Member(worker.seat, worker.number) for worker in inside)
        self.view = View(self._next_epoch, tuple(members), self.config.shape.tp)
        self._next_epoch += 1
        self._tries += 1
        self._broke_s = math.inf
        for worker in inside:
            worker.called_s = now_s
        return Form(self.view)

    def _ready(self) -> list[Tracked]:
        """Workers outside of the view that can join it: whole sets only."""
        ready = [each for each in self._live() if each.state.phase is WorkerPhase.READY and not each.is_called]
        present = Counter(self._set_of(worker) for worker in ready)
        return [worker for worker in ready if present[self._set_of(worker)] == self.config.shape.tp]

    def _set_of(self, worker: Tracked) -> int:
        return worker.seat // self.config.shape.tp

    def _replace(self, now_s: float) -> Iterator[Intent]:
        if not self.config.replace or self.is_leaving:
            return
        taken = {self._set_of(worker) for worker in self._workers.values()}
        for number, each in enumerate(self._sets):
            if number not in taken and now_s >= each.not_before_s:
                yield from self._start_set(number, now_s)

    def _start_set(self, number: int, now_s: float) -> Iterator[Start]:
        tp = self.config.shape.tp
        for seat in range(number * tp, (number + 1) * tp):
            worker = Tracked(self._next_worker, seat, heard_s=now_s, moved_s=now_s)
            self._workers[worker.number] = worker
            self._next_worker += 1
            yield Start(seat, worker.number)

    def _give_up(self, reason: str) -> Iterator[GiveUp]:
        if not self.given_up:
            self.given_up = reason
            yield GiveUp(reason)

    def _settle(self, now_s: float) -> None:
        """All that are left serve: writes down what it took."""
        self._tries, self._has_settled = 0, True
        for worker in self.members():
            worker.serving_since_s = min(worker.serving_since_s, now_s)
        if self._lost_s is not None:
            self.totals = self.totals.recovered(now_s - self._lost_s)
            self._lost_s = None
        if self._weak_s is not None and len(self.members()) == self.config.shape.world_size:
            self.totals = self.totals.restored(now_s - self._weak_s)
            self._weak_s = None
