"""A simulated group: a supervisor and the processes of its ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.ranks.server import RankServer
from moestro.cluster.simulation.gateway import SECRET
from moestro.cluster.simulation.mesh import Fabric
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import Observe, Output, SimulatedWorker, WorkerCosts
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2_grpc
from moestro.router.view import Member, View
from moestro.workers.scheduler_config import SchedulerConfig

REPORT_S = 0.5


class SimulatedRank:
    """A rank's process: the worker, and the real server that gateways attach to."""

    def __init__(
        self, process: Process, address: str, worker: int, epoch: int, sockets: Sockets, fabric: Fabric,
        config: SchedulerConfig, rng: random.Random, observe: Observe,
    ) -> None:  # fmt: skip
        self.process, self.address = process, address
        self.worker = SimulatedWorker(process, worker, fabric, config, WorkerCosts(), rng, self._publish, observe)
        self.server = RankServer(
            self.worker.submit,
            self.worker.limits,
            self.worker.load,
            SECRET,
            epoch,
            experts=_no_report,
            request_placement=_no_placement,
        )
        self._sockets_server = SimulatedServer(sockets, process, address)
        rank_pb2_grpc.add_RankServiceServicer_to_server(self.server, self._sockets_server)
        process.at_death(lambda: fabric.lose(worker))

    async def run(self) -> None:
        self._sockets_server.start()
        await self.worker.run()

    def _publish(self, output: Output) -> None:
        self.server.publish(output.deltas, output.refusals, output.load)


def _no_report() -> ExpertsReport:
    raise NotImplementedError


def _no_placement(request: PlacementRequest) -> None:
    raise NotImplementedError


class SimulatedGroup:
    """Starts its ranks, forms their view, reports them; when one dies it gives all up and begins anew."""

    def __init__(
        self, number: int, dp: int, make_process: Callable[[str], Process], sockets: Sockets, directory: DirectoryCalls,
        config: SchedulerConfig, rng: random.Random, trace: Trace, observe: Observe,
    ) -> None:  # fmt: skip
        self.ranks: list[SimulatedRank] = []
        self.process: Process
        self._number, self._dp, self._make_process, self._sockets = number, dp, make_process, sockets
        self._directory, self._config, self._rng = directory, config, rng
        self._trace, self._observe = trace, observe
        self._incarnation = 0

    def start(self) -> None:
        """A new supervisor."""
        self._incarnation += 1
        self.process = self._make_process(f"group{self._number}.{self._incarnation}")
        self.process.at_death(self._lose_all)
        self.process.spawn(self._run())

    async def _run(self) -> None:
        entry: GroupEntry = await self._retry(lambda: self._directory.begin(self._dp, 1))
        fabric = Fabric(self._sockets.network)
        died = asyncio.Event()
        self.ranks = []
        for number in range(self._dp):
            process = self._make_process(f"{entry.name}.{entry.epoch}/r{number}")
            process.at_death(died.set)
            rank = SimulatedRank(
                process, process.name, number, entry.epoch, self._sockets, fabric, self._config, self._rng,
                self._observe,
            )  # fmt: skip
            self.ranks.append(rank)
            process.spawn(rank.run())
        view = View(entry.epoch, tuple(Member(n, n) for n in range(self._dp)))
        processes = {n: rank.process for n, rank in enumerate(self.ranks)}
        for rank in self.ranks:
            rank.worker.form(view, processes)
        while not died.is_set():
            entry = replace(
                entry,
                ranks=tuple(
                    replace(
                        r, state=RankState(_STATES.get(rank.worker.state.phase.value, "starting")), address=rank.address
                    )
                    for r, rank in zip(entry.ranks, self.ranks, strict=True)
                ),
            )
            await self._retry(lambda: self._directory.put(entry))
            try:
                async with asyncio.timeout(REPORT_S):
                    await died.wait()
            except TimeoutError:
                continue
        lost = replace(entry, ranks=tuple(replace(r, state=RankState.LOST) for r in entry.ranks))
        await self._retry(lambda: self._directory.put(lost))
        self.process.kill()
        self.start()

    async def _retry(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await call()
            except ConnectionError:
                await asyncio.sleep(REPORT_S)

    def _lose_all(self) -> None:
        for rank in self.ranks:
            rank.process.kill()


_STATES = {"serving": "serving"}
