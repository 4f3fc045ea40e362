"""A gateway's side of the wire to one rank."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from moestro.cluster.ranks.server import CHANNEL_OPTIONS, SECRET_KEY
from moestro.protos import wire
from moestro.protos.errors import Overloaded, Unavailable
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta, SequenceRequest

log = logging.getLogger(__name__)


class RequestStream:
    """The deltas of one request's sequences. Filled by the link, drained by the edge; both on one loop."""

    def __init__(self, link: RankLink, sequence_ids: Sequence[str]) -> None:
        self._link = link
        self._open = set(sequence_ids)
        self._deltas: list[SequenceDelta] = []
        self._failure: Exception | None = None
        self._ready = asyncio.Event()

    async def next(self) -> list[SequenceDelta]:
        await self._ready.wait()
        self._ready.clear()
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            if self._failure is not None:
                self._ready.set()
            return deltas
        assert self._failure is not None, "woken with nothing to say"
        raise self._failure

    def cancel(self, sequence_id: str) -> None:
        if sequence_id in self._open:
            self._open.discard(sequence_id)
            self._link.cancel(sequence_id)

    def close(self) -> None:
        for sequence_id in tuple(self._open):
            self.cancel(sequence_id)

    def put(self, delta: SequenceDelta) -> None:
        self._deltas.append(delta)
        self._ready.set()

    def end(self, sequence_id: str) -> None:
        self._open.discard(sequence_id)

    def fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
            self._ready.set()


class RankLink:
    """One attached stream. ``on_lost`` is called once, on the loop, when the rank cannot be reached any more."""

    def __init__(self, address: str, gateway_id: str, secret: str, epoch: int, on_lost: Callable[[RankLink], None]):
        self.address = address
        self.load = EngineLoad()
        self.limits: EngineLimits | None = None
        self._hello = pb.AttachRequest(hello=pb.Hello(gateway_id=gateway_id, epoch=epoch))
        self._metadata = ((SECRET_KEY, secret),)
        self._on_lost = on_lost
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._outgoing: asyncio.Queue[pb.AttachRequest] = asyncio.Queue()
        self._streams: dict[str, RequestStream] = {}
        self._reader: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        """Sequences started here and not ended: the freshest measure of the load we put on the rank."""
        return len(self._streams)

    async def connect(self) -> EngineLimits:
        """Attaches. Raises Unavailable when the rank does not answer or refuses us."""
        stub = rank_pb2_grpc.RankServiceStub(self._channel)
        call = stub.Attach(self._requests(), metadata=self._metadata)
        try:
            first = await call.read()
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"rank at {self.address}: {error.details()}") from None
        if first is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise Unavailable(f"rank at {self.address} closed the stream")
        self.limits = wire.decode_limits(first.welcome.limits)
        self._reader = asyncio.create_task(self._read(call))
        return self.limits

    def start(self, sequences: Sequence[SequenceRequest]) -> RequestStream:
        stream = RequestStream(self, [sequence.sequence_id for sequence in sequences])
        for sequence in sequences:
            self._streams[sequence.sequence_id] = stream
            self._outgoing.put_nowait(pb.AttachRequest(submit=wire.encode_request(sequence)))
        return stream

    def cancel(self, sequence_id: str) -> None:
        if self._streams.pop(sequence_id, None) is not None:
            self._outgoing.put_nowait(pb.AttachRequest(cancel=sequence_id))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        await self._channel.close(None)

    async def _requests(self) -> AsyncIterator[pb.AttachRequest]:
        yield self._hello
        while True:
            yield await self._outgoing.get()

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]) -> None:
        reason = "closed the stream"
        try:
            async for response in call:
                self._take(response.step)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        except asyncio.CancelledError:
            reason = "this gateway is stopping"
            raise
        except Exception:
            log.exception("rank at %s sent something unreadable", self.address)
            reason = "sent something unreadable"
        finally:
            lost = Unavailable(f"a rank was lost: {reason}")
            for stream in set(self._streams.values()):
                stream.fail(lost)
            self._streams.clear()
            self._on_lost(self)

    def _take(self, step: pb.Step) -> None:
        if step.HasField("load"):
            self.load = wire.decode_load(step.load)
        for message in step.deltas:
            stream = self._streams.get(message.sequence_id)
            if stream is None:
                continue  # cancelled while the step was under way
            if message.refused:
                del self._streams[message.sequence_id]
                stream.end(message.sequence_id)
                stream.fail(Overloaded(message.error))
                continue
            delta = wire.decode_delta(message)
            if delta.finish_reason is not None:
                del self._streams[message.sequence_id]
                stream.end(message.sequence_id)
            stream.put(delta)
