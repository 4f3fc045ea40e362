"""gRPC over simulated pipes: as much of ``grpc.aio``'s channel and server as the cluster uses.

The real servicers are registered at a ``SimulatedServer``, and the real stubs and clients are given a
``SimulatedChannel`` in place of ``grpc.aio.insecure_channel``. Semantics that callers rely on are kept: order within a
call, status and trailers after the last message, one connection per channel whose loss fails all its calls, a handler
cancelled when its call is, flow control that makes a writer wait for a slow reader, deadlines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from moestro.cluster.simulation.network import Network, Pipe
from moestro.cluster.simulation.rpc_call import LOSS_S, ClientCall, Code, Metadata
from moestro.cluster.simulation.virtual_time import CURRENT, Process

KEEPALIVE_S = 8.0  # a connection that is silent for so long is given up


class Sockets:
    """Who listens where."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.servers: dict[str, SimulatedServer] = {}

    def channel(self, address: str) -> SimulatedChannel:
        """In place of ``grpc.aio.insecure_channel``; belongs to the process that asks for it."""
        process = CURRENT.get()
        assert process is not None, "a channel outside any process"
        return SimulatedChannel(self, process, address)

    def cut(self, client: Process) -> None:
        """All connections of a client break."""
        for server in tuple(self.servers.values()):
            for connection in tuple(server.connections):
                if connection.client is client:
                    connection.cut()

    async def keep_alive(self) -> None:
        """Breaks connections across which nothing has come for a while, as gRPC's pings do. For ever."""
        silent_since_s: dict[Connection, float] = {}
        while True:
            await asyncio.sleep(1.0)
            now_s = asyncio.get_running_loop().time()
            connections = [each for server in self.servers.values() for each in server.connections]
            silent = {each: silent_since_s.get(each, now_s) for each in connections if each.is_silent}
            for connection, since_s in silent.items():
                if now_s - since_s >= KEEPALIVE_S:
                    connection.cut()
            silent_since_s = silent

    def lose(self, process: Process) -> None:
        """A process has died: its connections break, after the time that it takes to be noticed."""
        for address, server in list(self.servers.items()):
            if server.process is process:
                del self.servers[address]
            for connection in tuple(server.connections):
                if process in (connection.client, server.process):
                    connection.cut()


class SimulatedServer:
    """Takes handlers as ``grpc.aio.Server`` does."""

    def __init__(self, sockets: Sockets, process: Process, address: str) -> None:
        self.process = process
        self.connections: dict[Connection, None] = {}
        self._generic: list[Any] = []
        self._address = address
        self._sockets = sockets

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._generic += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The same as the generic ones, for grpc's fast path."""

    def start(self) -> None:
        self._sockets.servers[self._address] = self

    def find(self, method: str) -> Any:
        details = _Details(method)
        return next((found for each in self._generic if (found := each.service(details)) is not None), None)


class _Details:
    """grpc.HandlerCallDetails."""

    invocation_metadata = ()

    def __init__(self, method: str) -> None:
        self.method = method


class Connection:
    """Between a channel and a server."""

    def __init__(self, network: Network, client: Process, server: SimulatedServer) -> None:
        self.network, self.client, self.server = network, client, server
        self.up: Pipe = network.pipe(client, server.process)
        self.down: Pipe = network.pipe(server.process, client)
        self.calls: dict[ClientCall, None] = {}
        self.is_open = True
        server.connections[self] = None

    @property
    def is_silent(self) -> bool:
        """Whether one end cannot hear the other."""
        network, server = self.network, self.server.process
        return not (network.passes(self.client, server) and network.passes(server, self.client))

    def cut(self) -> None:
        """Breaks: nothing more arrives, and both ends notice a little later."""
        if not self.is_open:
            return
        self.is_open = False
        self.server.connections.pop(self, None)
        self.up.close()
        self.down.close()
        loop = asyncio.get_running_loop()
        for call in tuple(self.calls):
            loop.call_later(LOSS_S, call.end, Code.UNAVAILABLE, "connection lost", ())
            loop.call_later(LOSS_S, call.stop_handler)


class SimulatedChannel:
    """Implements what is used of ``grpc.aio.Channel``."""

    def __init__(self, sockets: Sockets, process: Process, address: str) -> None:
        self.process = process
        self._sockets = sockets
        self._address = address
        self._connection: Connection | None = None
        self._calls: dict[ClientCall, None] = {}

    def stream_stream(self, method: str, *serializers: Any, **options: Any) -> Callable[..., ClientCall]:
        return self._method(method, *serializers, **options)

    unary_stream = unary_unary = stream_stream

    async def close(self, grace: float | None = None) -> None:
        for call in tuple(self._calls):
            call.cancel()

    def cut(self) -> None:
        """Its connection breaks."""
        if self._connection is not None:
            self._connection.cut()

    def connection(self) -> Connection | None:
        """The one there is, or a new one; None when nobody listens."""
        if self._connection is None or not self._connection.is_open:
            server = self._sockets.servers.get(self._address)
            if server is None or not server.process.is_alive:
                return None
            self._connection = Connection(self._sockets.network, self.process, server)
        return self._connection

    def _method(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., ClientCall]:
        def begin(request: Any, timeout: float | None = None, metadata: Metadata = ()) -> ClientCall:
            serialize = request_serializer or (lambda x: x)
            deserialize = response_deserializer or (lambda x: x)
            call = ClientCall(self, method, metadata, timeout, serialize, deserialize, request)
            self._calls[call] = None
            call.on_end = lambda: self._calls.pop(call, None)
            return call

        return begin
