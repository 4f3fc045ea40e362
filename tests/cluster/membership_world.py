"""Workers of one group in virtual time, for the membership: they load, join, serve, die, stop and hang. Obvious, not
fast."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Form, GiveUp, Intent, Kill, MembershipConfig, Start
from moestro.router.view import View
from moestro.workers.worker_state import WorkerPhase, WorkerState

P = WorkerPhase
POLL_S, TICK_S = 0.25, 0.1
LOAD_S, JOIN_S, NOTICE_S, KILL_S = 2.0, 0.2, 0.02, 0.05


@dataclass
class Process:
    seat: int
    number: int
    state: WorkerState = field(default_factory=lambda: WorkerState(P.LOADING))
    view: View | None = None
    alive: bool = True
    stopped: bool = False  # answers nothing, does nothing
    hung: bool = False  # answers, but its turn does not end
    busy: bool = True  # takes steps; else the group sleeps


@dataclass
class World:
    """A group's supervisor in miniature, over workers that are made up. ``busy``: there is work, so that a dead peer
    breaks the epoch at once; asleep nobody notices."""

    config: MembershipConfig
    seed: int = 0
    busy: bool = True
    dies_loading: dict[int, int] = field(default_factory=dict)  # seat -> how many more starts there fail

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.now_s = 0.0
        self.processes: dict[int, Process] = {}
        self.log: list[str] = []
        self.intents: list[tuple[float, Intent]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.membership = Membership(self.config, epoch=1)
        self.carry_out(self.membership.begin(self.now_s))
        self.later(TICK_S, self._tick)

    # Time.

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self._count += 1
        self._events.append((self.now_s + seconds, self._count, what))

    def run(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        end_s = self.now_s + seconds
        while True:
            event = min(self._events)
            if event[0] > end_s:
                break
            self._events.remove(event)
            self.now_s = event[0]
            event[2]()
            check()
        self.now_s = end_s

    def jitter(self, seconds: float) -> float:
        return seconds * self.random.uniform(0.5, 1.5) if self.seed else seconds

    def _tick(self) -> None:
        self.carry_out(self.membership.tick(self.now_s))
        self.later(TICK_S, self._tick)

    # What the supervisor does.

    def carry_out(self, intents: list[Intent]) -> None:
        for intent in intents:
            self.intents.append((self.now_s, intent))
            self.log.append(f"{self.now_s:.2f}  {described(intent)}")
            if isinstance(intent, Start):
                self._start(Process(intent.seat, intent.worker, busy=self.busy))
            elif isinstance(intent, Form):
                for member in intent.view.members:
                    self._form(self.processes[member.worker], intent.view)
            elif isinstance(intent, Kill) and intent.worker in self.processes:
                self._kill(self.processes[intent.worker])
            else:
                assert isinstance(intent, GiveUp | Kill)

    def _kill(self, process: Process) -> None:
        process.stopped = False
        self.later(self.jitter(KILL_S), lambda: self.die(process, "killed"))

    def tell(self, process: Process) -> None:
        if process.alive and not process.stopped:
            self.carry_out(self.membership.told(process.number, process.state, self.now_s))

    def _poll(self, process: Process) -> None:
        if process.alive:
            self.tell(process)
            self.later(self.jitter(POLL_S), lambda: self._poll(process))

    # What workers do.

    def _become(self, process: Process, **changes: object) -> None:
        process.state = replace(process.state, **changes)  # type: ignore[arg-type]
        self.later(self.jitter(0.005), lambda: self.tell(process))

    def _start(self, process: Process) -> None:
        self.processes[process.number] = process
        if self.dies_loading.get(process.seat, 0):
            self.dies_loading[process.seat] -= 1
            self.later(self.jitter(1.0), lambda: self.die(process, "out of memory"))
        else:
            self.later(self.jitter(LOAD_S), lambda: self._become(process, phase=P.READY))
        self._poll(process)

    def _form(self, process: Process, view: View) -> None:
        process.view = view

        def join() -> None:
            if process.alive and not process.stopped and not process.hung and process.view is view:
                self._become(process, phase=P.JOINING, epoch=view.epoch, progress=0, in_step_since_s=None)
                self.later(self.jitter(JOIN_S), lambda: self._joined(view))

        self.later(self.jitter(0.01), join)

    def _joined(self, view: View) -> None:
        here = [self.processes[member.worker] for member in view.members]
        if all(p.alive and p.state.epoch == view.epoch and p.state.phase is P.JOINING for p in here):
            for process in here:
                busy_since = self.now_s if process.busy else None
                self._become(process, phase=P.SERVING, turns=process.state.turns + 1, in_step_since_s=busy_since)
            self._step(view)

    def _step(self, view: View) -> None:
        """One step of all members, again and again; it breaks or stands still when one of them does not come."""
        here = [self.processes[member.worker] for member in view.members]
        if any(p.state.epoch != view.epoch or p.state.phase is not P.SERVING for p in here if p.alive):
            return
        if not all(process.busy for process in here):
            self.later(0.1, lambda: self._step(view))
        elif any(not process.alive for process in here):
            for process in here:
                self._become(process, phase=P.BROKEN, reason="connection reset")
        elif any(process.stopped or process.hung for process in here):
            for process in here:
                if not (process.stopped or process.hung):
                    process.state = replace(process.state, progress=process.state.progress + 1)
            self.later(self.config.watchdog_s, lambda: self._time_out(view))
        else:
            for process in here:
                turns, progress = process.state.turns + 1, process.state.progress + 2
                process.state = replace(process.state, turns=turns, progress=progress, in_step_since_s=self.now_s)
            self.later(0.05, lambda: self._step(view))

    def _time_out(self, view: View) -> None:
        for process in (self.processes[member.worker] for member in view.members):
            waits = process.alive and not process.stopped and not process.hung
            if waits and process.state.epoch == view.epoch and process.state.phase is P.SERVING:
                self._become(process, phase=P.BROKEN, reason="timed out")

    # Faults.

    def die(self, process: Process, reason: str = "exit code -9") -> None:
        if not process.alive:
            return
        process.alive = False
        self.log.append(f"{self.now_s:.2f}  . worker {process.number} ends: {reason}")
        notice_s = self.jitter(NOTICE_S)
        self.later(notice_s, lambda: self.carry_out(self.membership.died(process.number, reason, self.now_s)))
        view = process.view
        peers = [] if view is None else [self.processes[m.worker] for m in view.members if m.worker != process.number]
        for peer in peers:
            collective = peer.state.phase is P.JOINING or (peer.state.phase is P.SERVING and peer.busy)
            if peer.alive and not peer.hung and peer.view is view and collective:
                self._break_soon(peer, view)

    def _break_soon(self, process: Process, view: View | None) -> None:
        self.later(self.jitter(0.03), lambda: self._break(process, view))

    def _break(self, process: Process, view: View | None) -> None:
        if process.view is view and view is not None and process.state.epoch == view.epoch and not process.stopped:
            self._become(process, phase=P.BROKEN, reason="connection reset")

    def at(self, seat: int) -> Process:
        """The youngest process of a seat that is alive."""
        return [p for p in self.processes.values() if p.seat == seat and p.alive][-1]


def described(intent: Intent) -> str:
    match intent:
        case Start(seat, worker):
            return f"start worker {worker} in seat {seat}"
        case Form(view):
            members = " ".join(f"{member.seat}:{member.worker}" for member in view.members)
            return f"form epoch {view.epoch} of {members}"
        case Kill(worker, reason):
            return f"kill worker {worker}: {reason}"
        case GiveUp(reason):
            return f"give up: {reason}"
