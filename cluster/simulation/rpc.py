"""gRPC over simulated pipes: as much of ``grpc.aio``'s channel and server as the cluster uses.

The real servicers are registered at a ``SimulatedServer``, and the real stubs and clients are given a
``SimulatedChannel`` in place of ``grpc.aio.insecure_channel``. Semantics that callers rely on are kept: order within a
call, status and trailers after the last message, one connection per channel whose loss fails all its calls, a handler
cancelled when its call is, flow control that makes a writer wait for a slow reader, deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc

from moestro.cluster.simulation.network import Network, Pipe
from moestro.cluster.simulation.virtual_time import CURRENT, Process

Code = grpc.StatusCode
Metadata = Sequence[tuple[str, Any]]

WINDOW_BYTES = 1 << 16  # unread bytes of a call that make its writer wait; HTTP/2's default
KEEPALIVE_S = 8.0  # a connection that is silent for so long is given up
LOSS_S = 0.03  # until the kernel tells a process that the other end has died; measured with loopback and gloo

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]


class Aborted(Exception):
    """Ends a handler with a status."""

    def __init__(self, code: Code, details: str, metadata: Metadata) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.metadata = code, details, metadata


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


class ClientCall:
    """One call, seen from the client; knows its handler's task at the server too."""

    def __init__(
        self,
        channel: SimulatedChannel,
        method: str,
        metadata: Metadata,
        timeout_s: float | None,
        serialize: Callable[[Any], bytes],
        deserialize: Callable[[bytes], Any],
        request: Any,
    ) -> None:
        self.on_end: Callable[[], object] = lambda: None
        self.context: ServerContext | None = None
        self._loop = asyncio.get_running_loop()
        self._serialize, self._deserialize = serialize, deserialize
        self._messages: deque[bytes] = deque()
        self._status: tuple[Code, str, Metadata] | None = None
        self._wake = asyncio.Event()
        self._handler: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None
        if timeout_s is not None:
            self._timer = self._loop.call_later(max(0.0, timeout_s), self._expire)
        self._begin(channel, method, metadata, timeout_s, request)

    def _begin(
        self, channel: SimulatedChannel, method: str, metadata: Metadata, timeout_s: float | None, request: Any
    ) -> None:
        connection = self._connection = channel.connection()
        if connection is None:
            self._loop.call_later(LOSS_S, self.end, Code.UNAVAILABLE, "failed to connect", ())
            return
        connection.calls[self] = None
        context = self.context = ServerContext(self, connection, metadata, timeout_s)
        connection.up.send(lambda: self._accept(connection, method))
        if hasattr(request, "__aiter__"):
            self._pump = channel.process.spawn(self._send_requests(request, connection, context))
        else:
            data = self._serialize(request)
            connection.up.send(lambda: context.requests.put_nowait(data))
            connection.up.send(lambda: context.requests.put_nowait(None))

    async def _send_requests(
        self, requests: AsyncIterator[Any], connection: Connection, context: ServerContext
    ) -> None:
        async for request in requests:
            connection.up.send(partial(context.requests.put_nowait, self._serialize(request)))
        connection.up.send(lambda: context.requests.put_nowait(None))

    def _accept(self, connection: Connection, method: str) -> None:
        server = connection.server
        handler = server.find(method)
        assert handler is not None, f"nobody serves {method}"
        assert self.context is not None
        self._handler = server.process.spawn(_handle(handler, self.context))

    # The client's end.

    async def read(self) -> Any:
        """The next message, or EOF; raises AioRpcError when the call failed."""
        while not self._messages:
            if self._status is not None:
                code, details, metadata = self._status
                if code is Code.OK:
                    return _EOF
                if code is Code.CANCELLED:
                    raise asyncio.CancelledError
                raise grpc.aio.AioRpcError(
                    code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details, debug_error_string=""
                )
            self._wake.clear()
            await self._wake.wait()
        data = self._messages.popleft()
        connection, context = self._connection, self.context
        assert connection is not None
        assert context is not None
        connection.up.send(lambda: context.credit(len(data)))
        return self._deserialize(data)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not _EOF:
            yield message

    def __await__(self) -> Any:
        return self.read().__await__()

    def cancel(self) -> bool:
        """Tells the server, which cancels the handler."""
        if self._status is not None:
            return False
        if self._connection is not None:
            self._connection.up.send(self.stop_handler)
        self.end(Code.CANCELLED, "cancelled", ())
        return True

    def _expire(self) -> None:
        if self._connection is not None:
            self._connection.up.send(self.stop_handler)
        self.end(Code.DEADLINE_EXCEEDED, "deadline exceeded", ())

    def end(self, code: Code, details: str, metadata: Metadata) -> None:
        """The status has come. The first one counts."""
        if self._status is None:
            self._status = code, details, metadata
            if self._pump is not None:
                self._pump.cancel()
            if self._timer is not None:
                self._timer.cancel()
            if self._connection is not None:
                self._connection.calls.pop(self, None)
            self._wake.set()
            self.on_end()

    def deliver(self, data: bytes) -> None:
        if self._status is None:
            self._messages.append(data)
            self._wake.set()

    # The server's end.

    def stop_handler(self) -> None:
        if self._handler is not None:
            self._handler.cancel()


class ServerContext:
    """Implements what is used of ``grpc.aio.ServicerContext``."""

    def __init__(self, call: ClientCall, connection: Connection, metadata: Metadata, timeout_s: float | None) -> None:
        self.call, self.connection = call, connection
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.serialize: Callable[[Any], bytes] = bytes
        self._metadata = tuple(metadata)
        self._loop = asyncio.get_running_loop()
        self._until_s = None if timeout_s is None else self._loop.time() + timeout_s
        self._unread = 0
        self._read = asyncio.Event()

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def peer(self) -> str:
        return f"ipv4:{self.connection.client.name}:1"

    def time_remaining(self) -> float | None:
        return None if self._until_s is None else max(0.0, self._until_s - self._loop.time())

    def set_compression(self, compression: Any) -> None:
        pass

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        pass

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        pass

    async def abort(self, code: Code, details: str = "", trailing_metadata: Metadata = ()) -> None:
        raise Aborted(code, details, trailing_metadata)

    async def write(self, message: Any) -> None:
        """Waits while the client has too much unread."""
        while self._unread >= WINDOW_BYTES:
            self._read.clear()
            await self._read.wait()
        data = self.serialize(message)
        self._unread += len(data)
        self.connection.down.send(lambda: self.call.deliver(data))

    def credit(self, num_bytes: int) -> None:
        self._unread -= num_bytes
        self._read.set()

    def finish(self, code: Code, details: str = "", metadata: Metadata = ()) -> None:
        self.connection.down.send(lambda: self.call.end(code, details, tuple(metadata)))


async def _handle(handler: Any, context: ServerContext) -> None:
    read = handler.request_deserializer or (lambda x: x)
    context.serialize = handler.response_serializer or (lambda x: x)
    try:
        requests = _requests(context, read)
        request = requests if handler.request_streaming else await anext(requests)
        if handler.response_streaming:
            method = handler.stream_stream if handler.request_streaming else handler.unary_stream
            answer = method(request, context)
            if hasattr(answer, "__aiter__"):
                async with contextlib.aclosing(answer):
                    async for message in answer:
                        await context.write(message)
            else:
                await answer
        else:
            await context.write(await handler.unary_unary(request, context))
        context.finish(Code.OK)
    except Aborted as end:
        context.finish(end.code, end.details, end.metadata)
    except Exception as error:
        context.finish(Code.UNKNOWN, f"unexpected {type(error).__name__}: {error}")
        raise


async def _requests(context: ServerContext, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    while (data := await context.requests.get()) is not None:
        yield read(data)
