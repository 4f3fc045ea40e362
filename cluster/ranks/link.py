"""A gateway's side of the wire to one rank."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc

from moestro.cluster.backend import Capacity
from moestro.cluster.delta_streams import DeltaStreams, QueuedDeltas
from moestro.cluster.edge.statuses import DETAILS_KEY, error_of
from moestro.cluster.ranks.capacity import rank_capacity
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, SECRET_KEY
from moestro.protos import wire
from moestro.protos.errors import EngineLost, Unavailable
from moestro.protos.gen import inference_pb2 as public
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

OpenChannel = Callable[[str], Any]  # from an address to what is used of a grpc.aio.Channel

ASK_S = 5.0  # a rank answers from what it knows; one that takes so long must not make a scrape of metrics fail


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a rank."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def engine_name(group: str, address: str) -> str:
    """What operators call a rank's engine. No other one will ever have this name."""
    return f"{group} {address}".strip()


class RankLink:
    """One attached stream. ``name`` is of this link alone: the rank knows the sequences of a gateway by it. ``on_lost``
    is called once, on the loop, when the rank cannot be reached any more."""

    def __init__(
        self,
        address: str,
        name: str,
        secret: str,
        epoch: int,
        on_lost: Callable[[RankLink], None],
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.address = address
        self.load = EngineLoad()
        self.limits: EngineLimits | None = None
        self.group = ""  # as the directory names it
        self.is_computing = True  # else whatever it ends of, no request of ours has caused it
        self._hello = pb.AttachRequest(hello=pb.Hello(gateway_id=name, epoch=epoch))
        self._metadata = ((SECRET_KEY, secret),)
        self._on_lost = on_lost
        self._channel = open_channel(address)
        self._outgoing: asyncio.Queue[pb.AttachRequest | None] = asyncio.Queue()  # None: nothing more
        self._streams = DeltaStreams(name, self._cancel)
        self._reader: asyncio.Task[None] | None = None

    @property
    def num_open(self) -> int:
        """Sequences started here and not ended: the freshest measure of the load we put on the rank."""
        return len(self._streams)

    def capacity(self, gateways: int) -> Capacity:
        """What one of so many gateways may use of the rank, once connected."""
        assert self.limits is not None
        return rank_capacity(self.limits, self.load, self.num_open, gateways)

    async def connect(self) -> EngineLimits:
        """Attaches. Raises Unavailable when the rank does not answer or refuses us."""
        stub = rank_pb2_grpc.RankServiceStub(self._channel)
        call = stub.Attach(self._requests(), metadata=self._metadata)
        try:
            first = await self._unless_closed(call.read())
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"rank at {self.address}: {error.details()}") from None
        if first is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise Unavailable(f"rank at {self.address} closed the stream")
        self.limits = wire.decode_limits(first.welcome.limits)
        self._reader = asyncio.create_task(self._read(call))
        return self.limits

    def start(self, sequences: Sequence[SequenceRequest]) -> QueuedDeltas:
        stream, renamed = self._streams.open(sequences)
        for sequence in renamed:
            self._outgoing.put_nowait(pb.AttachRequest(submit=wire.encode_request(sequence)))
        return stream

    def _cancel(self, sequence_id: str) -> None:
        self._outgoing.put_nowait(pb.AttachRequest(cancel=sequence_id))

    async def experts(self) -> public.GroupExperts:
        """What the rank's group knows of its experts. Raises Unavailable, TimeoutError."""
        stub = rank_pb2_grpc.RankServiceStub(self._channel)
        call = stub.GetGroupExperts(pb.GetGroupExpertsRequest(), metadata=self._metadata, timeout=ASK_S)
        response: pb.GetGroupExpertsResponse = await self._asked(call)
        return response.experts

    async def set_placement(self, request: public.SetPlacementRequest) -> None:
        """Asks the rank's group to move its experts. Raises InvalidRequest, Unavailable, TimeoutError."""
        stub = rank_pb2_grpc.RankServiceStub(self._channel)
        message = pb.SetGroupPlacementRequest(request=request)
        await self._asked(stub.SetGroupPlacement(message, metadata=self._metadata, timeout=ASK_S))

    async def _asked(self, call: Awaitable[T]) -> T:
        """The answer, or the exception that its status stands for."""
        try:
            return await self._unless_closed(call)
        except grpc.aio.AioRpcError as error:
            metadata: Any = error.trailing_metadata() or ()
            details = next((value for key, value in metadata if key == DETAILS_KEY), None)
            raise error_of(error.code(), error.details() or "", details) from None

    async def _unless_closed(self, answer: Awaitable[T]) -> T:
        """grpc tells whoever waits on a channel that closes that it was cancelled itself, which it was not."""
        try:
            return await answer
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"rank at {self.address}: the connection was closed") from None

    async def break_off(self, reason: str) -> None:
        """The rank is lost, though its connection may not have noticed."""
        self.fail(reason)
        await self.close()

    async def close_when_done(self) -> None:
        """Lets what runs come to its end, or the rank to its own, then closes."""
        try:
            await self._streams.wait_none_open()
        finally:
            await self.close()

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._outgoing.put_nowait(None)  # grpc leaves the task that reads our requests waiting when the call has ended
        await self._channel.close(None)

    async def _requests(self) -> AsyncIterator[pb.AttachRequest]:
        yield self._hello
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]) -> None:
        reason = "closed the stream"
        try:
            while isinstance(response := await call.read(), pb.AttachResponse):
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
            self._reader = None
            self.fail(reason)
            self._on_lost(self)
        await self.close()

    def fail(self, reason: str) -> None:
        """Its streams go on elsewhere, at once."""
        failure = EngineLost(
            f"a rank was lost: {reason}", died=self.is_computing, engine=engine_name(self.group, self.address)
        )
        self._streams.fail(failure)

    def _take(self, step: pb.Step) -> None:
        if step.HasField("load"):
            self.load = wire.decode_load(step.load)
        for message in step.deltas:
            if message.refused:
                self._streams.refuse(message.sequence_id, message.error)
            elif message.lost:
                self._streams.lose(message.sequence_id, message.error)
            else:
                self._streams.deliver(wire.decode_delta(message))
