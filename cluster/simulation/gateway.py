"""A simulated gateway: the real request core, backend and handlers in a process of their own."""

from __future__ import annotations

from moestro.cluster.directory import GatewayEntry
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.directory_follower import DirectoryFollower
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_services import InferenceHandlers
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.text import served_letters
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process

SECRET = "secret"


class SimulatedGateway:
    """Serves at ``address`` from when a rank is attached."""

    def __init__(
        self, process: Process, address: str, sockets: Sockets, directory: DirectoryCalls, trace: Trace
    ) -> None:
        self.process, self.address = process, address
        self.backend = ClusterBackend(process.name, SECRET, sockets.channel)
        self.core = RequestCore([served_letters(self.backend)])
        self._server = SimulatedServer(sockets, process, address)
        self._server.add_generic_rpc_handlers((InferenceHandlers(self.core, "simulated").generic(),))
        self._directory = directory
        self._trace = trace

    async def run(self) -> None:
        follower = DirectoryFollower(self._directory, self.backend.update)
        following = self.process.spawn(follower.follow(), "follow")
        await self.backend.wait_attached()
        self._server.start()
        self._trace(self.process.name, "serves")
        self.process.spawn(follower.report(GatewayEntry(self.process.name, self.address)), "report")
        await following
