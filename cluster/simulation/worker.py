"""A simulated worker, in place of ``workers.worker.Worker`` with its thread, torch and collectives: one process of a
group through all its epochs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.mesh import EpochBroken, Fabric, Mesh
from moestro.cluster.simulation.turns import Output, Poisoned, Turns
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos.errors import CheckpointError, ExpertsDoNotFit
from moestro.router.placement import EMPTY
from moestro.router.view import View
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.worker_state import WorkerPhase, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """Seconds of what a worker does, and how long it waits for others to join."""

    start_s: float = 0.3
    load_s: float = 0.02  # an expert
    forming_s: float = 60.0


Observe = Callable[["SimulatedWorker", str, Mapping[str, Any]], None]


class SimulatedWorker:
    """``observe`` hears of states, placements and views."""

    def __init__(
        self, process: Process, worker: int, fabric: Fabric, config: SchedulerConfig, rng: random.Random,
        publish: Callable[[Output], None], changed: Callable[[], None], observe: Observe,
    ) -> None:  # fmt: skip
        self.process, self.worker = process, worker
        self.turns = Turns(config, rng, publish)
        self.held: list[set[int]] = []  # by mixture layer
        self.fails_to_load = 0  # times
        self._fabric, self._rng, self._observe = fabric, rng, observe
        self._costs = WorkerCosts()
        self._told = WorkerState(WorkerPhase.LOADING)
        self._changed = changed
        self._mesh: Mesh | None = None
        self._wanted: View | None = None
        self._formed = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()

    @property
    def state(self) -> WorkerState:
        progress = 0 if self._mesh is None else self._mesh.progress
        account = self.turns.account
        return replace(self._told, turns=account.turns, progress=progress, in_step_since_s=account.turn_since_s)

    def submit(self, message: bytes) -> None:
        self.turns.inbox.append(message)
        if self._mesh is not None:
            self._mesh.wake()

    def form(self, view: View) -> None:
        """Leave whatever it is in, and join a view. Returns at once."""
        self._observe(self, "view", {"view": view})
        if self._wanted is None or view.epoch > self._wanted.epoch:
            self._wanted = view
            self._formed.set()
            if self._mesh is not None:
                self._mesh.abort(f"epoch {view.epoch} is being formed")

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
                while self._wanted is None or self._wanted.epoch <= self._told.epoch:
                    self._formed.clear()
                    await self._formed.wait()
                await self._running.wait()
                view = self._wanted
                if view.rank_of(self.worker) is None:
                    self._tell(WorkerPhase.BROKEN, view.epoch, f"epoch {view.epoch} goes on without this worker")
                else:
                    await self._serve(view, experts)
        except CheckpointError as error:
            self._tell(WorkerPhase.FAILED, reason=str(error))
        except Poisoned:
            self._observe(self, "poisoned", {})
            await asyncio.Event().wait()  # for ever: the process is killed

    async def _serve(self, view: View, experts: Experts) -> None:
        """One epoch, from its forming to its end."""
        mesh = self._mesh = self._fabric.port(view.epoch, self.worker)
        mesh.join(view)
        self._tell(WorkerPhase.JOINING, view.epoch)
        peers = _peers(view, self.worker)
        try:
            await self._join(mesh, view, peers, experts)
            self._tell(WorkerPhase.SERVING)
            while True:
                await self._running.wait()
                await self.turns.turn(mesh, peers, self._pause)
        except (EpochBroken, ExpertsDoNotFit) as broken:
            mesh.abort(str(broken))
            self._tell(WorkerPhase.BROKEN, reason=str(broken))

    async def _join(self, mesh: Mesh, view: View, peers: tuple[int, ...], experts: Experts) -> None:
        """As ``workers.regroup``: each says what it really holds, and all compute from it where the experts go."""
        mine = [sorted(layer) for layer in self.held], self.turns.account.history
        held, histories = zip(*await mesh.gather(mine, self._costs.forming_s), strict=True)
        if len({histories[mesh.members.index(peer)] for peer in peers}) > 1:
            self.turns.begin_anew(view.epoch)
        placements = experts.rehomed(held)
        rank = view.rank_of(self.worker)
        assert rank is not None
        await self._load([set(placement.slots[rank]) - {EMPTY} for placement in placements], mesh)
        for told in await mesh.gather(placements, self._costs.forming_s):
            assert told == placements, "the members do not agree where the experts are"
        self._told = replace(self._told, spare_ranks=experts.spare_ranks(len(held), view.tp))
        self._observe(self, "placed", {"epoch": view.epoch, "placements": placements})

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

    def _tell(self, phase: WorkerPhase, epoch: int | None = None, reason: str = "") -> None:
        epoch = self._told.epoch if epoch is None else epoch
        self._told = replace(self._told, phase=phase, epoch=epoch, reason=reason)
        self._changed()
        self._observe(self, "state", {"phase": phase.value, "epoch": self._told.epoch, "reason": reason})

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._rng.uniform(0.9, 1.3))
        await self._running.wait()


def _peers(view: View, worker: int) -> tuple[int, ...]:
    """The workers of its tensor-parallel set, the leader first."""
    rank = view.rank_of(worker)
    assert rank is not None
    first = rank - rank % view.tp
    return tuple(member.worker for member in view.members[first : first + view.tp])
