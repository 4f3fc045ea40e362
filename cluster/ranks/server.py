"""A rank's side of the wire: sequences in, one message per engine step and gateway out.

Runs on the asyncio loop of the rank's process; the engine runs in a thread of its own and hands its steps over with
``publish``. A gateway that goes away takes its sequences with it: they are cancelled and their blocks freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from moestro.cluster.edge.statuses import status_of
from moestro.cluster.memory import Pressure
from moestro.cluster.ranks.placements import read_placement
from moestro.protos import wire
from moestro.protos.errors import Unavailable
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.experts_wire import encode_report
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta

log = logging.getLogger(__name__)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SECRET_KEY = "moestro-secret"
MAX_MESSAGE_BYTES = 64 * 2**20  # a prompt of a million tokens is about 4 MB; logprobs of one about 250 B a token
MAX_UNSENT_DELTAS = 2**18  # a gateway that lags so far behind is cut off, or its deltas would fill our memory
IN_USE = "its id is in use by a sequence of another connection"


ALIVE_S = 4.0  # a machine that is gone closes no connection: each end asks the other so often, and waits so long
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(ALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(ALIVE_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(ALIVE_S * 1000)),  # of other pings, which one to keep alive does not overtake
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", int(ALIVE_S * 500)),
)


@dataclass(eq=False)
class _Outbox:
    """What one attached gateway has not been sent yet, and the sequences it owns here."""

    message: pb.AttachResponse = field(default_factory=pb.AttachResponse)  # filled in place: nothing is copied
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    sequences: dict[str, None] = field(default_factory=dict)

    def add(self) -> pb.Delta:
        return self.message.step.deltas.add()


class RankServer(rank_pb2_grpc.RankServiceServicer):
    """``submit`` takes one serialized AttachRequest for the engine and must not block. ``experts`` says what the rank's
    group knows of its experts, ``request_placement`` asks the group to move them and raises InvalidRequest when it
    cannot. All three must be thread safe.

    ``epoch`` follows the views that the rank serves in; gateways stay attached meanwhile. One that knows of a newer
    epoch proves that the group serves without this rank: ``on_over`` is called with it."""

    def __init__(
        self,
        submit: Callable[[bytes], None],
        limits: EngineLimits,
        load: EngineLoad,
        secret: str,
        epoch: int = 0,
        *,
        experts: Callable[[], ExpertsReport],
        request_placement: Callable[[PlacementRequest], None],
        on_over: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        self._submit = submit
        self._experts = experts
        self._request_placement = request_placement
        self._limits = limits
        self._load = load
        self._secret = secret
        self.epoch = epoch
        self._on_over = on_over
        self._draining = False
        self._is_shedding = False
        self._failure = ""
        self._owner: dict[str, _Outbox] = {}
        self._outboxes: dict[_Outbox, None] = {}  # in the order of their coming
        self._none_open = asyncio.Event()
        self._none_open.set()

    def publish(
        self,
        deltas: Iterable[SequenceDelta],
        refusals: Iterable[tuple[str, str]],
        load: EngineLoad,
        lost: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Hands one step's results to the gateways that wait for them: deltas, and by sequence id the reasons why some
        were never admitted (``refusals``) or are here no more (``lost``). Call on the loop."""
        for delta in deltas:
            outbox = self._owner.get(delta.sequence_id)
            if outbox is None:
                continue  # its gateway left while the step ran
            wire.write_delta(delta, outbox.add())
            if delta.finish_reason is not None:
                self._forget(delta.sequence_id)
        for sequence_id, reason in refusals:
            self._refuse(sequence_id, reason)
        for sequence_id, reason in lost:
            self._lose(sequence_id, reason)
        self._load = load
        for outbox in self._outboxes:
            outbox.ready.set()

    @property
    def num_open(self) -> int:
        """Sequences that gateways have here."""
        return len(self._owner)

    def set_pressure(self, pressure: Pressure) -> None:
        """How short memory is. While it is short nothing new is taken. What waits here is a short line without blocks,
        and stays. Call on the loop."""
        self._is_shedding = pressure >= Pressure.NEW
        for outbox in self._outboxes:
            outbox.ready.set()

    def fail(self, reason: str) -> None:
        """The engine is gone: every attached gateway is told, and so is every one that comes. Call on the loop."""
        self._failure = reason
        for outbox in self._outboxes:
            outbox.ready.set()

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new. Returns when no sequence is open here; what is when the time is up is to go elsewhere."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        for sequence_id in tuple(self._owner):
            self._leave(sequence_id)

    def _leave(self, sequence_id: str) -> None:
        """Sends a sequence elsewhere."""
        outbox = self._owner[sequence_id]
        self._lose(sequence_id, "the rank is leaving")
        self._submit(pb.AttachRequest(cancel=sequence_id).SerializeToString())
        outbox.ready.set()

    def _refuse(self, sequence_id: str, reason: str) -> None:
        if (outbox := self._owner.get(sequence_id)) is not None:
            outbox.add().MergeFrom(pb.Delta(sequence_id=sequence_id, error=reason, refused=True))
            self._forget(sequence_id)

    def _lose(self, sequence_id: str, reason: str) -> None:
        if (outbox := self._owner.get(sequence_id)) is not None:
            outbox.add().MergeFrom(pb.Delta(sequence_id=sequence_id, error=reason, lost=True))
            self._forget(sequence_id)

    def _forget(self, sequence_id: str) -> None:
        outbox = self._owner.pop(sequence_id, None)
        if outbox is not None:
            outbox.sequences.pop(sequence_id, None)
        if not self._owner:
            self._none_open.set()

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.AttachRequest],
        context: grpc.aio.ServicerContext[pb.AttachRequest, pb.AttachResponse],
    ) -> AsyncIterator[pb.AttachResponse]:
        await self._check_secret(context)
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "hello must come first")
            return
        if first.hello.epoch > self.epoch > 0:
            self._on_over(first.hello.epoch)
        if first.hello.epoch < self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch {first.hello.epoch} is over")
        outbox = _Outbox()
        outbox.ready.set()  # the load and the failure, if any, are news to this gateway
        self._outboxes[outbox] = None
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        try:
            yield pb.AttachResponse(welcome=pb.Welcome(epoch=self.epoch, limits=wire.encode_limits(self._limits)))
            while not (reader.done() and not outbox.sequences):
                await outbox.ready.wait()
                outbox.ready.clear()
                if self._failure:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, self._failure)
                if len(outbox.message.step.deltas) > MAX_UNSENT_DELTAS:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the gateway reads too slowly")
                message, outbox.message = outbox.message, pb.AttachResponse()
                message.step.load.CopyFrom(wire.encode_load(self._load))
                message.step.load.shedding = self._is_shedding
                yield message
        finally:
            reader.cancel()
            self._outboxes.pop(outbox, None)
            for sequence_id in tuple(outbox.sequences):
                self._cancel(sequence_id)

    async def GetGroupExperts(self, request: pb.GetGroupExpertsRequest, context: Context) -> pb.GetGroupExpertsResponse:
        """The group's name is left out: a rank does not know it."""

        def read() -> pb.GetGroupExpertsResponse:
            return pb.GetGroupExpertsResponse(experts=encode_report(self._experts(), epoch=self.epoch))

        return await self._answer(read, context)

    async def SetGroupPlacement(
        self, request: pb.SetGroupPlacementRequest, context: Context
    ) -> pb.SetGroupPlacementResponse:
        def ask() -> pb.SetGroupPlacementResponse:
            self._request_placement(read_placement(request.request, self._experts()))
            return pb.SetGroupPlacementResponse()

        return await self._answer(ask, context)

    async def _answer(self, work: Callable[[], T], context: Context) -> T:
        """Works in a thread, since the loop carries the tokens; what is raised there becomes the status."""
        await self._check_secret(context)
        try:
            if self._failure:
                raise Unavailable(self._failure)
            return await asyncio.to_thread(work)
        except Exception as error:
            status = status_of(error, request_id="")
            if status.code is grpc.StatusCode.INTERNAL:
                log.exception("a question about experts failed")
            await context.abort(status.code, status.message, status.metadata)
            raise  # not reached: abort has raised

    async def _check_secret(self, context: Context) -> None:
        given = dict(context.invocation_metadata() or ()).get(SECRET_KEY, "")
        if not hmac.compare_digest(str(given).encode(), self._secret.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this is not a gateway of this cluster")

    async def _read(self, requests: AsyncIterator[pb.AttachRequest], outbox: _Outbox) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "submit" and self._owner.setdefault(request.submit.sequence_id, outbox) is not outbox:
                outbox.add().MergeFrom(pb.Delta(sequence_id=request.submit.sequence_id, error=IN_USE, refused=True))
                outbox.ready.set()
            elif kind == "submit":
                self._none_open.clear()
                outbox.sequences[request.submit.sequence_id] = None
                if self._draining:
                    self._leave(request.submit.sequence_id)
                elif self._is_shedding:
                    self._refuse(request.submit.sequence_id, "memory runs short")
                    outbox.ready.set()
                else:
                    self._submit(request.SerializeToString())
            elif kind == "cancel" and self._owner.get(request.cancel) is outbox:
                self._cancel(request.cancel)
        outbox.ready.set()

    def _cancel(self, sequence_id: str) -> None:
        self._forget(sequence_id)
        self._submit(pb.AttachRequest(cancel=sequence_id).SerializeToString())
