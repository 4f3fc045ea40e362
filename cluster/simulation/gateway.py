"""A simulated gateway: the real request core, backend and handlers in a process of their own."""

from __future__ import annotations

from moestro.cluster.directory import GatewayEntry, GroupEntry
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.directory_follower import DirectoryFollower
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_services import InferenceHandlers
from moestro.cluster.edge.slow_consumers import SlowConsumers
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.simulation.rpc import SimulatedServer, Sockets
from moestro.cluster.simulation.text import served_letters
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process

SECRET = "secret"
STALL_S = 30.0  # that a client may read nothing
MAX_UNREAD_TOKENS = 4096


class SimulatedGateway:
    """Serves at ``address`` from when a rank is attached."""

    def __init__(
        self, process: Process, address: str, sockets: Sockets, directory: DirectoryCalls, gateways: int, trace: Trace
    ) -> None:
        self.process, self.address = process, address
        self.backend = ClusterBackend(process.name, SECRET, sockets.channel, gateways=gateways)
        self.core = RequestCore([served_letters(self.backend)])
        slow = SlowConsumers(STALL_S, MAX_UNREAD_TOKENS)
        self._server = SimulatedServer(sockets, process, address)
        self._server.add_generic_rpc_handlers((InferenceHandlers(self.core, "simulated", slow).generic(),))
        self._directory = directory
        self._trace = trace
        self._epochs: dict[str, int] = {}  # by group, the last that was heard of

    async def run(self) -> None:
        follower = DirectoryFollower(self._directory, self._update, self.backend.attached_groups)
        following = self.process.spawn(follower.follow(), "follow")
        await self.backend.wait_attached()
        self._server.start()
        self._trace(self.process.name, "serves")
        await follower.arrive(GatewayEntry(self.process.name, self.address))
        self.process.spawn(follower.report(), "report")
        await following

    def _update(self, groups: tuple[GroupEntry, ...]) -> None:
        for group in groups:
            known = self._epochs.get(group.name, 0)
            assert group.epoch >= known, f"{self.process.name}: {group.name} went from epoch {known} to {group.epoch}"
            self._epochs[group.name] = group.epoch
        self.backend.update(groups)
