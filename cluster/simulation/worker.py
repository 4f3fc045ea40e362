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

from moestro.cluster.simulation.mesh import EpochBroken, Fabric, Mesh
from moestro.cluster.simulation.model import NamedCache
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta
from moestro.router.view import View
from moestro.workers.engine import Engine
from moestro.workers.runner import StepRunner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.worker_state import WorkerPhase, WorkerState


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
        self.state = WorkerState(WorkerPhase.LOADING)
        self.on_state: Callable[[WorkerState], None] = lambda state: None
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

    async def run(self) -> None:
        await self._pause(self._costs.start_s)
        self._tell(WorkerPhase.READY)
        while True:
            while self._wanted is None or self._wanted[0].epoch <= self.state.epoch:
                self._formed.clear()
                await self._formed.wait()
            view, processes = self._wanted
            mesh = self._fabric.port(view.epoch, self.worker)
            mesh.join(view, processes)
            self.mesh = mesh
            try:
                self._tell(WorkerPhase.JOINING, view.epoch)
                await self._join(mesh, view)
                self._tell(WorkerPhase.SERVING, view.epoch)
                while True:
                    await self._turn(mesh, view)
            except EpochBroken as broken:
                mesh.abort(str(broken))
                self._tell(WorkerPhase.BROKEN, view.epoch, str(broken))

    async def _join(self, mesh: Mesh, view: View) -> None:
        await mesh.gather(view, self._costs.forming_s)

    async def _turn(self, mesh: Mesh, view: View) -> None:
        """One round."""
        engine, costs, time = self._engine, self._costs, asyncio.get_running_loop().time
        await self._running.wait()
        self._turns += 1
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

    def _tell(self, phase: WorkerPhase, epoch: int = 0, reason: str = "") -> None:
        self.state = WorkerState(phase, epoch or self.state.epoch, reason, self._turns)
        self._observe(self, "state", {"phase": phase.value, "epoch": self.state.epoch, "reason": reason})
        self.on_state(self.state)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._rng.uniform(0.9, 1.3))
        await self._running.wait()
