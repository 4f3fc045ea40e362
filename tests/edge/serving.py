"""A real grpc.aio server in this process over a stub backend, and raw ways to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from tests.edge.fakes import LIMITS, SMALL, FakeText, served

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits
from moestro.cluster.edge.stub import StubBackend, StubCluster
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc

GENERATE = "/moestro.v1.InferenceService/Generate"


@dataclass
class Rig:
    backend: StubBackend
    core: RequestCore
    server: GrpcServer
    port: int
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return pb_grpc.InferenceServiceStub(self.channel)

    async def generate(self, request: pb.GenerateRequest, **options: Any) -> list[pb.StreamEvent]:
        return [response.event async for response in self.stub.Generate(request, **options)]

    async def raw(self, data: bytes, method: str = GENERATE) -> list[bytes]:
        return [response async for response in self.channel.unary_stream(method)(data)]

    async def settled(self) -> None:
        """Waits until nothing is open; fails after two seconds."""
        for _ in range(200):
            if not self.backend.open_sequences and not self.core.num_open:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"leaked: {self.backend.open_sequences}, {self.core.num_open} requests open")


@contextlib.asynccontextmanager
async def rig(
    backend: StubBackend | None = None, limits: EdgeLimits = SMALL, text: FakeText | None = None
) -> AsyncIterator[Rig]:
    """Serves while inside, and checks at the end that nothing has leaked."""
    backend = backend or StubBackend(LIMITS)
    core = RequestCore([served(backend, text)], limits)
    server = GrpcServer(core, StubCluster(), "test", GrpcOptions(host="127.0.0.1", port=0))
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            it = Rig(backend, core, server, port, channel)
            yield it
            await it.settled()
    finally:
        await server.stop(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@dataclass
class Refusal:
    """A status as a client sees it."""

    code: grpc.StatusCode
    message: str
    fields: dict[str, str]
    reason: str
    retry_s: float | None
    request_id: str


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    found: dict[str, Any] = {}
    for packed in status.details:
        for kind in (
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.ErrorInfo,
            error_details_pb2.RequestInfo,
        ):
            message = kind()
            if packed.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    bad, retry = found.get("BadRequest"), found.get("RetryInfo")
    return Refusal(
        code=error.code(),
        message=error.details() or "",
        fields={v.field: v.description for v in bad.field_violations} if bad else {},
        reason=found["ErrorInfo"].reason if "ErrorInfo" in found else "",
        retry_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        request_id=found["RequestInfo"].request_id if "RequestInfo" in found else "",
    )


async def refused(call: Any) -> Refusal:
    """Awaits a call that must fail."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    raise AssertionError(f"was not refused: {answer}")


async def raw_http2(port: int, headers: dict[str, str], body: bytes, patience_s: float = 5.0) -> bytes:
    """One gRPC call with hand-made headers (a library adds, drops and checks some), over HTTP/2 with prior knowledge
    (RFC 9113); header fields are sent as literals (RFC 7541, 6.2.2). Returns all bytes the server sent until it ended
    the stream or was silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    block = b"".join(b"\x00" + hpack_string(name) + hpack_string(value) for name, value in headers.items())
    message = b"\x00" + struct.pack(">I", len(body)) + body
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(frame(4, 0, 0, b""))  # SETTINGS
    writer.write(frame(1, 4, 1, block))  # HEADERS, END_HEADERS
    writer.write(frame(0, 1, 1, message))  # DATA, END_STREAM
    await writer.drain()
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        async with asyncio.timeout(patience_s):
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3]))
                received += head + payload
                if head[3] in (1, 3) and (head[4] & 1 or head[3] == 3) and int.from_bytes(head[5:9]) == 1:
                    break
    writer.close()
    return received


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def hpack_string(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
