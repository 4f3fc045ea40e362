"""The gRPC face of the request core: one coroutine per method, bytes in and bytes out.

Messages are parsed and serialised here and not by gRPC, so that a malformed one gets a status that names its field,
and so that a streamed token costs one message and one write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from moestro.cluster.edge.callers import Caller
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.incidents_wire import encode_incident
from moestro.cluster.edge.parsing import parse
from moestro.cluster.edge.request_ids import new_request_id
from moestro.cluster.edge.slow_consumers import SlowConsumers
from moestro.cluster.edge.statuses import status_of
from moestro.cluster.edge.wire import encode_completion, encode_event
from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.gen import inference_pb2 as pb

log = logging.getLogger(__name__)

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
CLUSTER = pb.DESCRIPTOR.services_by_name["ClusterService"].full_name
COMPRESSION_KEY = "moestro-compression"  # metadatum of a client that wants its stream compressed: "gzip"
CLIENT_KEY = "moestro-client"  # metadatum: who the request is for, which admission is fair to; absent: the peer's host
MAX_ID_CHARS = 128  # of an id that is told back, and of a client's name
COMPRESS_FROM_BYTES = 1024  # smaller answers are not worth it

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class InferenceHandlers:
    """moestro.v1.InferenceService."""

    def __init__(self, core: RequestCore, version: str, slow: SlowConsumers) -> None:
        self._core = core
        self._slow = slow
        self._version = version
        self._started_s = time.monotonic()

    def generic(self) -> grpc.GenericRpcHandler[Any, Any]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            INFERENCE,
            {
                "Generate": stream(_streaming(pb.GenerateRequest, self._stream)),
                "Chat": stream(_streaming(pb.ChatRequest, self._stream)),
                "Complete": unary(_unary(pb.CompleteRequest, self._complete)),
                "Tokenize": unary(_unary(pb.TokenizeRequest, self._tokenize)),
                "Detokenize": unary(_unary(pb.DetokenizeRequest, self._detokenize)),
                "ListModels": unary(_unary(pb.ListModelsRequest, self._list_models)),
                "GetServerInfo": unary(_unary(pb.GetServerInfoRequest, self._server_info)),
            },
        )

    async def _stream(self, request: pb.GenerateRequest | pb.ChatRequest, context: Context) -> None:
        if context.time_remaining() == 0:
            raise TimeoutError("the deadline has passed")
        if (COMPRESSION_KEY, "gzip") in (context.invocation_metadata() or ()):
            context.set_compression(grpc.Compression.Gzip)
        # From here on the deadline is gRPC's: when it passes, this task is cancelled, which closes the stream.
        with await self._core.open(request, caller=_caller(context)) as stream, self._slow.watch(stream) as reader:
            while (event := await stream.next()) is not None:
                reader.writing = event.sequence_number
                await context.write(encode_event(event))
                reader.writing = None

    async def _complete(self, request: pb.CompleteRequest, context: Context) -> bytes:
        if context.time_remaining() == 0:
            raise TimeoutError("the deadline has passed")
        try:
            return encode_completion(await self._core.complete(request.request, caller=_caller(context)))
        except InvalidRequest as error:
            # The same request one level deeper, so its paths are too.
            raise type(error)([FieldViolation(f"request.{v.field}", v.description) for v in error.violations]) from None

    async def _tokenize(self, request: pb.TokenizeRequest, context: Context) -> bytes:
        return pb.TokenizeResponse(token_ids=await self._core.tokenize(request)).SerializeToString()

    async def _detokenize(self, request: pb.DetokenizeRequest, context: Context) -> bytes:
        return pb.DetokenizeResponse(text=await self._core.detokenize(request)).SerializeToString()

    async def _list_models(self, request: pb.ListModelsRequest, context: Context) -> bytes:
        models = [
            pb.Model(
                name=model.name,
                architecture=model.architecture,
                max_context=model.backend.limits.max_context,
                vocab_size=model.backend.limits.vocab_size,
                dtype=model.dtype,
                has_chat_template=model.text.has_chat_template,
            )
            for model in self._core.models.values()
        ]
        return pb.ListModelsResponse(models=models).SerializeToString()

    async def _server_info(self, request: pb.GetServerInfoRequest, context: Context) -> bytes:
        backends = [model.backend for model in self._core.models.values()]
        return pb.GetServerInfoResponse(
            version=self._version,
            uptime_seconds=time.monotonic() - self._started_s,
            max_message_bytes=self._core.limits.max_message_bytes,
            max_waiting=min(backend.limits.max_waiting for backend in backends),
            max_open_requests=self._core.limits.max_open_requests,
        ).SerializeToString()


class ClusterSource(Protocol):
    """Who answers operators. Both calls about experts raise InvalidRequest for a group that is not known."""

    async def status(self) -> pb.GetClusterStatusResponse: ...

    async def experts(self, request: pb.GetExpertsRequest) -> pb.GetExpertsResponse: ...

    async def set_placement(self, request: pb.SetPlacementRequest) -> pb.SetPlacementResponse: ...


class ClusterHandlers:
    """moestro.v1.ClusterService."""

    def __init__(self, core: RequestCore, cluster: ClusterSource) -> None:
        self._core = core
        self._cluster = cluster

    def generic(self) -> grpc.GenericRpcHandler[Any, Any]:
        unary = grpc.unary_unary_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            CLUSTER,
            {
                "GetClusterStatus": unary(_unary(pb.GetClusterStatusRequest, self._cluster_status)),
                "GetExperts": unary(_unary(pb.GetExpertsRequest, self._experts)),
                "SetPlacement": unary(_unary(pb.SetPlacementRequest, self._set_placement)),
                "GetIncidents": unary(_unary(pb.GetIncidentsRequest, self._incidents)),
            },
        )

    async def _cluster_status(self, request: pb.GetClusterStatusRequest, context: Context) -> bytes:
        response = await self._cluster.status()
        response.open_streams = self._core.num_open
        response.queued_requests = self._core.num_queued
        return response.SerializeToString()

    async def _experts(self, request: pb.GetExpertsRequest, context: Context) -> bytes:
        return (await self._cluster.experts(request)).SerializeToString()

    async def _set_placement(self, request: pb.SetPlacementRequest, context: Context) -> bytes:
        validate_placement(request)
        return (await self._cluster.set_placement(request)).SerializeToString()

    async def _incidents(self, request: pb.GetIncidentsRequest, context: Context) -> bytes:
        found = self._core.recovery.incidents.latest()
        if request.name:
            found = [incident for incident in found if incident.name == request.name]
            if not found:
                described = f"this gateway keeps no incident {request.name[:MAX_ID_CHARS]!r}"
                raise InvalidRequest([FieldViolation("name", described)])
        now_s = asyncio.get_running_loop().time()
        return pb.GetIncidentsResponse(incidents=[encode_incident(each, now_s) for each in found]).SerializeToString()


def validate_placement(request: pb.SetPlacementRequest) -> None:
    """What can be said without knowing the model. Raises InvalidRequest."""
    if request.WhichOneof("placement") == "even" and not request.even:
        raise InvalidRequest([FieldViolation("even", "must be true or absent, got false")])
    if request.WhichOneof("placement") is None and not request.HasField("rebalance"):
        raise InvalidRequest([FieldViolation("placement", "set one of experts, random_seed and even, or rebalance")])


def _streaming(
    kind: type[M], method: Callable[[M, Context], Awaitable[None]]
) -> Callable[[bytes, Context], Awaitable[None]]:
    async def handle(data: bytes, context: Context) -> None:
        request_id = new_request_id()
        try:
            request = parse(kind, data)
            request_id = _identify(request, request_id)
            await method(request, context)
        except Exception as error:
            await _abort(context, error, request_id)

    return handle


def _unary(
    kind: type[M], method: Callable[[M, Context], Awaitable[bytes]]
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def handle(data: bytes, context: Context) -> bytes:
        request_id = new_request_id()
        try:
            request = parse(kind, data)
            request_id = _identify(request, request_id)
            response = await method(request, context)
        except Exception as error:
            await _abort(context, error, request_id)
            raise  # not reached: abort has raised
        if len(response) >= COMPRESS_FROM_BYTES:
            context.set_compression(grpc.Compression.Gzip)  # gRPC sends it plain to a client that does not take it
            await context.send_initial_metadata(())  # without this grpc.aio forgets it in a unary call
        return response

    return handle


def _caller(context: Context) -> Caller:
    metadata = context.invocation_metadata() or ()
    name = next((value for key, value in metadata if key == CLIENT_KEY), None) or context.peer().rpartition(":")[0]
    return Caller(str(name)[:MAX_ID_CHARS], context.time_remaining())


def _identify(request: Message, new_id: str) -> str:
    """The client's own id of the request, or the new one, which is then put into the request where it has a place."""
    inner = getattr(request, "request", request)
    if isinstance(inner, pb.GenerateRequest | pb.ChatRequest):
        inner.request_id = inner.request_id or new_id
        return inner.request_id[:MAX_ID_CHARS]
    return new_id


async def _abort(context: Context, error: Exception, request_id: str) -> None:
    status = status_of(error, request_id)
    if status.code is grpc.StatusCode.INTERNAL:
        log.error("request %r failed: %s", request_id, error, exc_info=error)
    await context.abort(status.code, status.message, status.metadata)
