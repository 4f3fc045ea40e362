"""A simulated rank's process, in place of ``ranks.process.RankProcess``: the worker, and the real server that gateways
attach to."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from moestro.cluster.ranks.report import UNHEARD, WATCH_S, RankReport
from moestro.cluster.ranks.server import RankServer
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.gateway import SECRET
from moestro.cluster.simulation.handles import Handle, Host, ProcessDied
from moestro.cluster.simulation.mesh import Fabric
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.turns import Output
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import Observe, SimulatedWorker
from moestro.cluster.supervisor import Held, WorkerGone
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2_grpc
from moestro.router.view import View
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.worker_state import WorkerPhase

KILL_S = 0.2  # at most, until a process that is killed is gone
NOTICE_S = 0.01  # at most, until a supervisor on the same host hears of an end


class SimulatedRank:
    """One process of a group; ``leads`` when it talks to gateways."""

    def __init__(
        self, process: Process, worker: int, leads: bool, sockets: Sockets, fabric: Fabric, config: SchedulerConfig,
        rng: random.Random, observe: Observe,
    ) -> None:  # fmt: skip
        self.process, self.address = process, process.name if leads else ""
        self.worker = SimulatedWorker(process, worker, fabric, config, rng, self._publish, self._refresh, observe)
        self.server = RankServer(
            self.worker.submit,
            self.worker.turns.limits,
            self.worker.turns.load,
            SECRET,
            experts=_no_report,
            request_placement=_no_placement,
            on_over=self._over,
        )
        self._report = UNHEARD
        self._changed = asyncio.Event()
        self._socket = SimulatedServer(sockets, process, process.name)
        rank_pb2_grpc.add_RankServiceServicer_to_server(self.server, self._socket)
        process.at_death(lambda: fabric.lose(worker))

    async def run(self, experts: Experts) -> None:
        if self.address:
            self._socket.start()
        await self.worker.run(experts)
        self.server.fail("its engine died")

    async def watch(self, version: int) -> RankReport:
        """Answers when there is another version than ``version``, or after WATCH_S."""
        if version == self._report.version:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._changed.wait()
            except TimeoutError:
                self._refresh()
        return self._report

    async def form(self, view: View) -> None:
        self.worker.form(view)

    async def holdings(self) -> Held:
        return tuple(tuple(sorted(layer)) for layer in self.worker.held)

    async def drain(self, seconds: float) -> None:
        await self.server.drain(seconds)

    async def stop(self) -> None:
        self.process.kill()

    def _refresh(self) -> None:
        state, now_s = self.worker.state, asyncio.get_running_loop().time()
        age_s = None if state.in_step_since_s is None else now_s - state.in_step_since_s
        if state.phase is WorkerPhase.SERVING:
            self.server.epoch = state.epoch
        self._report = replace(
            self._report, version=self._report.version + 1, state=state, step_age_s=age_s, address=self.address
        )
        self._changed.set()
        self._changed = asyncio.Event()

    def _publish(self, output: Output) -> None:
        if self.address:
            self.server.publish(output.deltas, output.refusals, output.load, output.lost)

    def _over(self, epoch: int) -> None:
        self.process.kill()


class SimulatedHandle:
    """Implements ``WorkerHandle``."""

    def __init__(self, rank: SimulatedRank, sockets: Sockets, rng: random.Random) -> None:
        self._rank, self._rng = rank, rng
        self._calls = Handle(sockets.network, lambda: Host(rank.process, rank))
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        rank.process.at_death(lambda: _later(rng.uniform(0.0, NOTICE_S), self._ended))

    async def watch(self, version: int) -> RankReport:
        try:
            report: RankReport = await self._calls.watch(version)
        except ProcessDied as error:
            raise WorkerGone(str(error)) from None
        return report

    async def gone(self) -> str:
        return await asyncio.shield(self._ended)

    async def form(self, view: View) -> None:
        await self._calls.form(view)

    async def holdings(self) -> Held:
        held: Held = await self._calls.holdings()
        return held

    async def drain(self, seconds: float) -> None:
        await self._calls.drain(seconds)

    async def stop(self) -> None:
        await self._calls.stop()

    def kill(self) -> None:
        asyncio.get_running_loop().call_later(self._rng.uniform(0.0, KILL_S), self._rank.process.kill)


def _later(after_s: float, ended: asyncio.Future[str]) -> None:
    def tell() -> None:
        if not ended.done():
            ended.set_result("its process has ended")

    asyncio.get_running_loop().call_later(after_s, tell)


def _no_report() -> ExpertsReport:
    raise NotImplementedError


def _no_placement(request: PlacementRequest) -> None:
    raise NotImplementedError
