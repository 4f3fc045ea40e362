"""A simulated gateway: the real request core, backend and handlers in a process of their own."""

from __future__ import annotations

import asyncio

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_services import InferenceHandlers
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.simulation.handles import Handle
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.text import served_letters
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process

SECRET = "secret"
RETRY_S = 1.0


class SimulatedGateway:
    """Serves at ``address`` from when a rank is attached."""

    def __init__(self, process: Process, address: str, sockets: Sockets, directory: Handle, trace: Trace) -> None:
        self.process, self.address = process, address
        self.backend = ClusterBackend(process.name, SECRET, sockets.channel)
        self.core = RequestCore([served_letters(self.backend)])
        self._server = SimulatedServer(sockets, process, address)
        self._server.add_generic_rpc_handlers((InferenceHandlers(self.core, "simulated").generic(),))
        self._directory = directory
        self._trace = trace

    async def run(self) -> None:
        watching = self.process.spawn(self._watch(), "watch")
        await self.backend.wait_attached()
        self._server.start()
        self._trace(self.process.name, "serves")
        await watching

    async def _watch(self) -> None:
        version = -1
        while True:
            try:
                snapshot = await self._directory.watch.remote(version)
            except ConnectionError:
                version = -1
                await asyncio.sleep(RETRY_S)
                continue
            version = snapshot.version
            self.backend.update(snapshot.groups)
