"""A simulated worker: a real engine (scheduler, block pools) over a model of names, in lockstep with its group.

In place of ``workers.worker.Worker`` with its thread, torch and collectives; the turn is ``RankLoop``'s, written over
awaits. What a broken epoch leaves behind follows the same rules: messages that were taken stay taken, a plan in flight
is abandoned, results of the step before are published.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.mesh import EpochBroken, Fabric, Mesh
from moestro.cluster.simulation.model import NamedCache
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos import wire
from moestro.protos.errors import CheckpointError
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta
from moestro.router.placement import EMPTY
from moestro.router.view import View
from moestro.workers.engine import Engine
from moestro.workers.runner import StepRunner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.worker_state import WorkerPhase, WorkerState

WATCH_S = 0.25  # a worker that is asked says at least so often how it is


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """Seconds of what a worker does."""

    start_s: float = 0.3
    load_s: float = 0.02  # an expert
    step_s: float = 0.005
    token_s: float = 0.0001
    watchdog_s: float = 3.0
    forming_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one turn has to say."""

    deltas: Sequence[SequenceDelta]
    refusals: Sequence[tuple[str, str]]
    load: EngineLoad


Observe = Callable[["SimulatedWorker", str, Mapping[str, Any]], None]


class SimulatedWorker:
    """One process of a group through all its epochs."""

    def __init__(
        self,
        process: Process,
        worker: int,
        fabric: Fabric,
        config: SchedulerConfig,
        costs: WorkerCosts,
        rng: random.Random,
        publish: Callable[[Output], None],
        observe: Observe,
    ) -> None:
        self.process, self.worker = process, worker
        self.slowness = 1.0
        self.held: list[set[int]] = []  # by mixture layer
        self.fails_to_load = 0  # times
        self._told = WorkerState(WorkerPhase.LOADING)
        self._changed = asyncio.Event()
        self._turn_since_s: float | None = None
        self.mesh: Mesh | None = None
        self._fabric, self._costs, self._rng = fabric, costs, rng
        self._publish, self._observe = publish, observe
        self._names = NamedCache(config, rng)
        self.scheduler = Scheduler(config)
        self.limits = EngineLimits(28, config.context_limit, config.max_waiting)
        self._engine = Engine(self.scheduler, cast(StepRunner, self._names), self.limits)
        self._inbox: list[bytes] = []
        self._wanted: tuple[View, dict[int, Process]] | None = None
        self._formed = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._turns = 0

    @property
    def load(self) -> EngineLoad:
        return replace(self._engine.load(), slowness=self.slowness)

    @property
    def state(self) -> WorkerState:
        progress = 0 if self.mesh is None else self.mesh.progress
        return replace(self._told, turns=self._turns, progress=progress, in_step_since_s=self._turn_since_s)

    async def watch(self, told: WorkerPhase | None, epoch: int) -> WorkerState:
        """Its state, when phase or epoch is another one than was told before, or after a while."""
        try:
            async with asyncio.timeout(WATCH_S):
                while (self._told.phase, self._told.epoch) == (told, epoch):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.state

    def submit(self, message: bytes) -> None:
        self._inbox.append(message)
        if self.mesh is not None:
            self.mesh.wake()

    def form(self, view: View, processes: dict[int, Process]) -> None:
        """Leave whatever it is in, and join a view. Returns at once."""
        if self._wanted is None or view.epoch > self._wanted[0].epoch:
            self._wanted = view, processes
            self._formed.set()
            if self.mesh is not None:
                self.mesh.abort(f"epoch {view.epoch} is being formed")

    def hold(self) -> None:
        """The process is stopped."""
        self._running.clear()

    def go_on(self) -> None:
        self._running.set()

    async def run(self, experts: Experts) -> None:
        """Loads, then serves view after view. Returns when it has failed of its own fault."""
        await self._pause(self._costs.start_s)
        try:
            await self._load(experts.to_hold)
            self._tell(WorkerPhase.READY)
            while True:
                while self._wanted is None or self._wanted[0].epoch <= self._told.epoch:
                    self._formed.clear()
                    await self._formed.wait()
                view, processes = self._wanted
                if view.rank_of(self.worker) is None:
                    self._tell(WorkerPhase.BROKEN, view.epoch, f"epoch {view.epoch} goes on without this worker")
                else:
                    await self._serve(view, processes, experts)
        except CheckpointError as error:
            self._tell(WorkerPhase.FAILED, reason=str(error))

    async def _serve(self, view: View, processes: dict[int, Process], experts: Experts) -> None:
        """One epoch, from its forming to its end."""
        mesh = self.mesh = self._fabric.port(view.epoch, self.worker)
        mesh.join(view, processes)
        self._tell(WorkerPhase.JOINING, view.epoch)
        try:
            await self._join(mesh, view, experts)
            self._tell(WorkerPhase.SERVING)
            while True:
                await self._turn(mesh, view)
        except EpochBroken as broken:
            mesh.abort(str(broken))
            self._turn_since_s = None
            self._tell(WorkerPhase.BROKEN, reason=str(broken))

    async def _join(self, mesh: Mesh, view: View, experts: Experts) -> None:
        """As ``workers.regroup``: each says what it really holds, and all compute from it where the experts go."""
        held = await mesh.gather([sorted(layer) for layer in self.held], self._costs.forming_s)
        placements = experts.rehomed(held)
        rank = view.rank_of(self.worker)
        assert rank is not None
        await self._load([set(placement.slots[rank]) - {EMPTY} for placement in placements], mesh)
        for told in await mesh.gather(placements, self._costs.forming_s):
            assert told == placements, "the members do not agree where the experts are"
        self._observe(self, "placed", {"epoch": view.epoch, "placements": placements, "held": self.held})

    async def _load(self, wanted: list[set[int]], mesh: Mesh | None = None) -> None:
        """Reads what is missing and drops what is surplus. Raises CheckpointError."""
        held = self.held or [set[int]()] * len(wanted)
        missing = sum(len(want - have) for want, have in zip(wanted, held, strict=True))
        if missing:
            await self._pause(self._costs.load_s * missing)
        if self.fails_to_load and missing:
            self.fails_to_load -= 1
            raise CheckpointError("an expert cannot be read")
        if mesh is not None and mesh.broken:
            raise EpochBroken(mesh.broken)
        self.held = wanted

    async def _turn(self, mesh: Mesh, view: View) -> None:
        """One round."""
        engine, costs, time = self._engine, self._costs, asyncio.get_running_loop().time
        await self._running.wait()
        self._turns += 1
        self._turn_since_s = asyncio.get_running_loop().time()
        refusals = self._take_in()
        plan = engine.plan(time())
        try:
            said = await mesh.gather((mesh.progress, plan.num_tokens, view.epoch), costs.watchdog_s)
            steps, tokens, epochs = zip(*said, strict=True)
            self._observe(self, "agreed", {"steps": steps, "epochs": epochs, "epoch": view.epoch})
            if any(tokens):
                if self._names.kills(plan):
                    self._observe(self, "poisoned", {})
                    await asyncio.Event().wait()  # for ever: the process is killed
                await self._pause((costs.step_s + costs.token_s * plan.num_tokens) * self.slowness)
                await mesh.gather(None, costs.watchdog_s)
        except EpochBroken:
            self._names.spoil(plan)
            self.scheduler.abandon(plan)
            self.scheduler.check_integrity()
            self._say([], refusals)
            raise
        if any(tokens):
            deltas = engine.collect(plan, engine.launch(plan, tokens), time)
        else:
            deltas = engine.skip(plan, time())
        self.scheduler.check_integrity()
        self._say(deltas, refusals)
        if not any(tokens):
            self._turn_since_s = None
            await mesh.sleep()

    def _take_in(self) -> list[tuple[str, str]]:
        messages, self._inbox = self._inbox, []
        refusals = []
        for data in messages:
            message = pb.AttachRequest.FromString(data)
            if message.WhichOneof("message") == "cancel":
                self._engine.cancel(message.cancel)
            else:
                now = asyncio.get_running_loop().time()
                reason = self._engine.add(wire.decode_request(message.submit), now)
                if reason is not None:
                    refusals.append((message.submit.sequence_id, reason))
        return refusals

    def _say(self, deltas: Sequence[SequenceDelta], refusals: Sequence[tuple[str, str]]) -> None:
        if deltas or refusals:
            self._publish(Output(deltas, refusals, self.load))

    def _tell(self, phase: WorkerPhase, epoch: int | None = None, reason: str = "") -> None:
        self._told = WorkerState(phase, self._told.epoch if epoch is None else epoch, reason)
        self._changed.set()
        self._observe(self, "state", {"phase": phase.value, "epoch": self._told.epoch, "reason": reason})

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._rng.uniform(0.9, 1.3))
        await self._running.wait()
