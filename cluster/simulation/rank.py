"""A simulated rank's process: the worker, and the real server that gateways attach to."""

from __future__ import annotations

import random

from moestro.cluster.ranks.server import RankServer
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.gateway import SECRET
from moestro.cluster.simulation.mesh import Fabric
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.turns import Output
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import Observe, SimulatedWorker
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2_grpc
from moestro.workers.scheduler_config import SchedulerConfig


class SimulatedRank:
    """One process of a group."""

    def __init__(
        self, process: Process, worker: int, epoch: int, sockets: Sockets, fabric: Fabric, config: SchedulerConfig,
        rng: random.Random, observe: Observe,
    ) -> None:  # fmt: skip
        self.process, self.address = process, process.name
        self.worker = SimulatedWorker(process, worker, fabric, config, rng, self._publish, observe)
        self.server = RankServer(
            self.worker.submit,
            self.worker.turns.limits,
            self.worker.turns.load,
            SECRET,
            epoch,
            experts=_no_report,
            request_placement=_no_placement,
        )
        self._socket = SimulatedServer(sockets, process, self.address)
        rank_pb2_grpc.add_RankServiceServicer_to_server(self.server, self._socket)
        process.at_death(lambda: fabric.lose(worker))

    async def run(self, experts: Experts) -> None:
        self._socket.start()
        await self.worker.run(experts)
        self.server.fail("its engine died")

    def _publish(self, output: Output) -> None:
        self.server.publish(output.deltas, output.refusals, output.load)


def _no_report() -> ExpertsReport:
    raise NotImplementedError


def _no_placement(request: PlacementRequest) -> None:
    raise NotImplementedError
