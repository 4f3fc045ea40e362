"""The experts of a group while it serves: observes them, moves them, tells about them.

Every rank runs the same ``Rebalancer`` on the same observations, so all decide alike without a coordinator. This part
carries out what it asks for: what takes time runs in the background of each rank, and the switch of a layer happens at
the head of the step in which every rank has said that it is ready. A rank that dies, or a group that stops, leaves
every layer as it was before or after its switch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.router.assign import lay_out
from moestro.router.parallel import TensorParallel
from moestro.router.placement import Placement, moves
from moestro.router.rebalance.messages import Drop, Intent, Solve, StartLoad, StartSolve, Switch
from moestro.router.rebalance.rebalancer import Rebalancer
from moestro.router.stragglers import Stragglers, Work
from moestro.workers.lockstep import NOTHING, Lockstep, Note, StepAgreement
from moestro.workers.model.moe import ExpertBank
from moestro.workers.rebalancing.background import Background
from moestro.workers.rebalancing.commands import decode, encode, wanted_placements
from moestro.workers.rebalancing.loader import Loaded, OpenSource, load_experts
from moestro.workers.rebalancing.observer import Observer
from moestro.workers.rebalancing.reports import Reporter

log = logging.getLogger(__name__)

OBSERVE_S = 2.0  # between observations, but at least OBSERVATIONS in a window
OBSERVATIONS = 8
_NS = 1e-9


@dataclass(frozen=True, slots=True)
class _Task:
    """What the background is doing, and which intent it answers."""

    number: int
    intent: StartSolve | StartLoad


class GroupExperts:
    """One rank's part. ``report`` and ``request`` may be called from any thread, the rest belongs to the engine's."""

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        lockstep: Lockstep,
        rank: int,
        seats: tuple[int, ...],
        node_of_rank: tuple[int, ...],
        rebalancer: Rebalancer,
        solve: Solve,
        open_source: OpenSource,
        reporter: Reporter,
        window_s: float,
        tp: TensorParallel,
    ) -> None:
        """``banks`` by decoder layer; at least one. ``solve`` is the same pure function on every rank."""
        self._banks = tuple(banks.values())
        self._lockstep = lockstep
        self._rank = rank
        self._seats, self._node_of_rank = seats, node_of_rank
        self._rebalancer = rebalancer
        self._solve = solve
        self._open_source = open_source
        self._reporter = reporter
        self._observe_every_s = min(OBSERVE_S, window_s / OBSERVATIONS)
        self._observer = Observer(self._banks, tp, lockstep)
        self._stragglers = Stragglers(len(self._banks[0].layout.placement.slots))
        self._peers = slice(rank - tp.rank, rank - tp.rank + tp.size)
        self._background = Background(lockstep.wake)
        self._task: _Task | None = None
        self._observe_at_s = 0.0
        self._wait_ns = 0  # of the last step
        self._has_stepped = False
        self._slowest_steps = [0] * len(self._banks[0].layout.placement.slots)
        self._lock = threading.Lock()
        self._commands: list[bytes] = []  # guarded by the lock
        self._placements = tuple(bank.layout.placement for bank in self._banks)  # replaced whole; read by any thread
        reporter.publish(rebalancer, time.monotonic())

    def note(self) -> Note:
        """What this rank tells the others at the head of the next step."""
        with self._lock:
            command_bytes = len(self._commands[0]) if self._commands else 0
        return Note(self._background.done, self._background.failed, command_bytes, time.monotonic_ns(), self._wait_ns)

    def turn(self, agreement: StepAgreement) -> None:
        """After an agreement, before its step. Collective: every rank does the same."""
        now_s = agreement.notes[0].clock_ns * _NS
        intents: list[Intent] = []
        for root, note in enumerate(agreement.notes):
            if note.command_bytes:
                intents += self._take_command(root, note.command_bytes, now_s)
        if self._has_stepped:
            self._has_stepped = False
            waits = [note.wait_ns for note in agreement.notes]
            self._slowest_steps[waits.index(min(waits))] += 1
        ended = self._ended(agreement.notes)
        if ended:
            intents += self._answer(agreement.notes)
        # What is observed before a switch was computed before it. A group about to sleep leaves nothing uncounted.
        if ended or now_s >= self._observe_at_s or (agreement.idle and self._observer.has_counted):
            intents += self._observe(now_s)
        for intent in intents:
            self._carry_out(intent)
        if intents or any(note.command_bytes for note in agreement.notes):
            self._reporter.publish(self._rebalancer, now_s)

    def stepped(self, seconds: float, num_tokens: int, kv_blocks: int) -> None:
        """After a step that computed something, on this rank or on others."""
        self._wait_ns = self._observer.stepped(seconds, num_tokens, kv_blocks)
        self._has_stepped = True

    def report(self) -> ExpertsReport:
        """What is known of the experts, as of the last observation."""
        return self._reporter.report()

    def request(self, request: PlacementRequest) -> None:
        """Asks the whole group for a placement. Raises ValueError when it does not fit."""
        wanted_placements(request, self._placements)
        with self._lock:
            self._commands.append(encode(request))
        self._lockstep.wake()

    @property
    def slowness(self) -> float:
        """Of this rank's tensor-parallel set, whose ranks all take as long as the slowest of them."""
        return max(self._stragglers.slowness_R[self._peers])

    def close(self) -> None:
        """Gives up what runs in the background."""
        self._background.cancel()

    def _observe(self, now_s: float) -> Iterable[Intent]:
        self._observe_at_s = now_s + self._observe_every_s
        seen, works = self._observer.observe(now_s)
        self._reporter.saw(seen, self._placements, self._slowest_steps)
        self._slowest_steps = [0] * len(self._slowest_steps)
        self._name_stragglers(works)
        intents = self._rebalancer.observe(seen, self._stragglers.slowness_R)
        self._reporter.publish(self._rebalancer, now_s)
        return intents

    def _name_stragglers(self, works: Sequence[Work]) -> None:
        before = self._stragglers.slowness_R
        self._stragglers.observe(works)
        for seat, was, now in zip(self._seats, before, self._stragglers.slowness_R, strict=True):
            if was == 1 < now:
                log.warning("rank %d takes %.1f times as long as the others for the same work", seat, now)
            elif now == 1 < was:
                log.info("rank %d is as fast as the others again", seat)

    def _take_command(self, root: int, num_bytes: int, now_s: float) -> Iterable[Intent]:
        with self._lock:
            mine = self._commands.pop(0) if root == self._rank else b""
        request = decode(self._lockstep.broadcast(mine, root, num_bytes))
        intents: list[Intent] = []
        if request.rebalance is False:
            intents += self._rebalancer.pause(now_s)
        elif request.rebalance:
            self._rebalancer.resume()
        placements = wanted_placements(request, self._placements)
        if placements is not None:
            intents += self._rebalancer.request(placements, "An operator asked for it", now_s)
        return intents

    def _ended(self, notes: Iterable[Note]) -> bool:
        task = self._task
        return task is not None and all(max(note.done, note.failed) >= task.number for note in notes)

    def _answer(self, notes: Iterable[Note]) -> Iterable[Intent]:
        task, self._task = self._task, None
        assert task is not None
        failed = [rank for rank, note in enumerate(notes) if note.failed == task.number]
        if failed:
            return self._rebalancer.failed(task.intent.ticket, f"on rank {failed[0]}, whose log says why")
        if isinstance(task.intent, StartSolve):
            self._rebalancer.solved(task.intent.ticket, self._background.take())
        else:
            self._rebalancer.ready(task.intent.ticket)
        return ()

    def _carry_out(self, intent: Intent) -> None:
        match intent:
            case StartSolve():
                work: Callable[[threading.Event], Any] = partial(_solve, self._solve, intent)
                self._task = _Task(self._background.begin(work), intent)
            case StartLoad():
                self._task = _Task(self._background.begin(self._loading(intent)), intent)
            case Switch():
                self._switch(intent)
            case Drop():
                self._background.cancel()
                self._task = None

    def _loading(self, intent: StartLoad) -> Callable[[threading.Event], Loaded]:
        bank = self._banks[intent.layer]
        steps = moves(bank.layout.placement, intent.placement)
        slots = [(step.slot, step.expert) for step in steps if step.rank == self._rank]
        return partial(load_experts, bank, slots, self._open_source, intent.bytes_per_s)

    def _switch(self, intent: Switch) -> None:
        started = time.perf_counter_ns()
        bank = self._banks[intent.layer]
        loaded: Loaded = self._background.take()
        layout = lay_out(intent.placement, self._rank, bank.rows_L.device, self._node_of_rank)
        bank.switch_(layout, loaded.staged)
        self._placements = tuple(bank.layout.placement for bank in self._banks)
        self._observer.counters.loaded_bytes += loaded.num_bytes
        self._observer.counters.switch_ns += time.perf_counter_ns() - started


def _solve(solve: Solve, intent: StartSolve, cancelled: threading.Event) -> tuple[Placement, ...]:
    return solve(intent.loads_LE, intent.previous, intent.slowness)


class NoExperts:
    """A dense model's: nothing to observe and nothing to move."""

    slowness = 1.0

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def note(self) -> Note:
        return NOTHING

    def turn(self, agreement: StepAgreement) -> None:
        pass

    def stepped(self, seconds: float, num_tokens: int, kv_blocks: int) -> None:
        pass

    def report(self) -> ExpertsReport:
        return ExpertsReport(self._architecture, 0, 0, 0.0, (), ())

    def request(self, request: PlacementRequest) -> None:
        raise ValueError(f"{self._architecture} has no mixture layers")

    def close(self) -> None:
        pass
