"""A simulated group, in place of ``serving.group_service.GroupService``: the real supervisor over simulated ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.membership_records import MembershipConfig
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.mesh import Fabric
from moestro.cluster.simulation.rank import SimulatedHandle, SimulatedRank
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import Observe
from moestro.cluster.supervisor import GroupFailed, Held, Supervisor
from moestro.router.parallel import GroupShape
from moestro.workers.scheduler_config import SchedulerConfig

CHECK_S = 0.5  # between two health checks of Serve
RESTART_S = 1.0  # until Serve has started another one
DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What every group of a scenario is like."""

    shape: GroupShape
    scheduler: SchedulerConfig
    experts: Experts


class SimulatedGroup:
    """A place for a group. When its process dies or gives up, a new one begins with new ranks."""

    def __init__(
        self, number: int, plan: GroupPlan, make_process: Callable[[str], Process], sockets: Sockets,
        directory: DirectoryCalls, rng: random.Random, observe: Observe,
    ) -> None:  # fmt: skip
        self.process: Process
        self.name = ""
        self._all: list[SimulatedRank] = []
        self.failing_loads = 0  # workers to come that cannot read their experts
        self.number, self._plan = number, plan
        self._make_process, self._sockets, self._directory = make_process, sockets, directory
        self._rng, self._observe = rng, observe
        self._incarnation = 0
        self._supervisor: Supervisor | None = None

    @property
    def ranks(self) -> list[SimulatedRank]:
        """Those that live."""
        return [rank for rank in self._all if rank.process.is_alive]

    @property
    def entry(self) -> GroupEntry | None:
        return None if self._supervisor is None else self._supervisor.entry

    @property
    def is_full(self) -> bool:
        """Whether every seat serves."""
        entry = self.entry
        return entry is not None and not entry.forming and all(r.state is RankState.SERVING for r in entry.ranks)

    def start(self) -> None:
        """A new process for the supervisor."""
        self._incarnation += 1
        self.process = self._make_process(f"group-{self.number}.{self._incarnation}")
        self.process.at_death(self._end)
        self.process.spawn(self._run(self.process))

    def _end(self) -> None:
        """With the supervisor go the store and all that it has started."""
        for rank in self.ranks:
            rank.process.kill()
        self._supervisor = None
        asyncio.get_running_loop().call_later(RESTART_S, self.start)

    async def _run(self, process: Process) -> None:
        shape, experts = self._plan.shape, self._plan.experts
        while True:
            try:
                entry = await self._directory.begin(shape.dp, shape.tp)
                break
            except ConnectionError:
                await asyncio.sleep(CHECK_S)
        self.name, self._all = entry.name, []
        fabric = Fabric(self._sockets.network)

        async def launch(seat: int, worker: int, held: Held | None, gently: bool) -> SimulatedHandle:
            return self._launch(process, fabric, seat, worker, held)

        self._supervisor = supervisor = Supervisor(
            MembershipConfig(shape), entry, self._directory, launch, drain_s=DRAIN_S, redundant=experts.redundant
        )
        try:
            await supervisor.start()
            while True:
                await asyncio.sleep(CHECK_S)
                supervisor.check()
        except GroupFailed:
            await supervisor.stop()
        process.kill()

    def _launch(self, process: Process, fabric: Fabric, seat: int, worker: int, held: Held | None) -> SimulatedHandle:
        """A process for a seat, which begins to load."""
        shape, experts = self._plan.shape, self._plan.experts
        rank = SimulatedRank(
            self._make_process(f"{process.name}/w{worker}"), worker, seat % shape.tp == 0, self._sockets, fabric,
            self._plan.scheduler, self._rng, self._observe,
        )  # fmt: skip
        self._all.append(rank)
        fabric.processes[worker] = rank.process
        if self.failing_loads:
            self.failing_loads -= 1
            rank.worker.fails_to_load = 1
        to_hold = (
            experts.at_start(shape.world_size, seat) if held is None else replace(experts, to_hold=list(map(set, held)))
        )
        rank.process.spawn(rank.run(to_hold), "rank")
        return SimulatedHandle(rank, self._sockets, self._rng)
