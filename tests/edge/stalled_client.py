"""A client that opens a stream and does not read it: HTTP/2 by hand, since gRPC's own reads ahead (RFC 9113)."""

from __future__ import annotations

import asyncio
import struct

from tests.edge.serving import GENERATE, frame, hpack_string

from moestro.protos.gen import inference_pb2 as pb

WINDOW = 500  # bytes that the server may send: some ten tokens


class StalledClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def call(port: int, request: pb.GenerateRequest) -> StalledClient:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": GENERATE,
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(b"\x00" + hpack_string(name) + hpack_string(value) for name, value in headers.items())
        body = request.SerializeToString()
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        writer.write(frame(4, 0, 0, struct.pack(">HI", 4, WINDOW)))  # SETTINGS: INITIAL_WINDOW_SIZE
        writer.write(frame(1, 4, 1, block))  # HEADERS, END_HEADERS
        writer.write(frame(0, 1, 1, b"\x00" + struct.pack(">I", len(body)) + body))  # DATA, END_STREAM
        await writer.drain()
        return StalledClient(reader, writer)

    async def read_on(self) -> tuple[list[pb.StreamEvent], bytes]:
        """Opens the window: all that there is to read, and the trailers as they were sent."""
        self._writer.write(frame(8, 0, 1, struct.pack(">I", 2**20)))  # WINDOW_UPDATE
        data = trailers = b""
        async with asyncio.timeout(10):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == 0:
                    data += payload
                if head[3] == 1:
                    trailers = payload
                if head[3] in (0, 1) and head[4] & 1:  # END_STREAM
                    break
        events = []
        while data:
            length = int.from_bytes(data[1:5])
            events.append(pb.GenerateResponse.FromString(data[5 : 5 + length]).event)
            data = data[5 + length :]
        return events, trailers

    async def hang_up(self) -> None:
        self._writer.transport.abort()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)
