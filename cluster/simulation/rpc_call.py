"""One simulated gRPC call, from both of its ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from moestro.cluster.simulation.rpc import Connection, SimulatedChannel

Code = grpc.StatusCode
Metadata = Sequence[tuple[str, Any]]

WINDOW_BYTES = 1 << 16  # unread bytes of a call that make its writer wait; HTTP/2's default
LOSS_S = 0.03  # until the kernel tells a process that the other end has died; measured with loopback and gloo

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]


class Aborted(Exception):
    """Ends a handler with a status."""

    def __init__(self, code: Code, details: str, metadata: Metadata) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.metadata = code, details, metadata


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
