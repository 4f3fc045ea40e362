"""A Moestro cluster over its public gRPC interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from itertools import cycle

import grpc
import grpc.aio

from moestro.cluster.bench.records import ServerLedger
from moestro.cluster.bench.target import Chunk, TargetError, TargetInfo
from moestro.cluster.bench.workload import BenchRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen.inference_pb2_grpc import InferenceServiceStub

_DESCRIBE_TIMEOUT_S = 10.0
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Without it, channels to one address share one connection, and so one stream of bytes.
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcTarget:
    """``InferenceService.Generate`` at ``address``. Requests take turns on ``channels`` connections, opened lazily."""

    def __init__(self, address: str, model: str = "", channels: int = 4) -> None:
        self._model = model
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(channels)]
        self._stubs = [InferenceServiceStub(channel) for channel in self._channels]
        self._turns = cycle(self._stubs)

    async def describe(self) -> TargetInfo:
        try:
            for channel in self._channels:  # connect now: no measured request should pay for it
                channel.get_state(try_to_connect=True)
            listing = await self._stubs[0].ListModels(pb.ListModelsRequest(), timeout=_DESCRIBE_TIMEOUT_S)
            server = await self._stubs[0].GetServerInfo(pb.GetServerInfoRequest(), timeout=_DESCRIBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise _target_error(error) from None
        names = [model.name for model in listing.models]
        if self._model not in names and (self._model or len(names) != 1):
            raise TargetError(
                "NOT_FOUND", f"--model must be one of {', '.join(names) or '(none)'}, got {self._model!r}"
            )
        model = listing.models[names.index(self._model) if self._model else 0]
        return TargetInfo(
            kind="moestro-grpc",
            model=model.name,
            version=server.version or None,
            vocab_size=model.vocab_size or None,
            max_context=model.max_context or None,
            dtype=model.dtype or None,
        )

    async def run(self, request: BenchRequest) -> AsyncGenerator[Chunk]:
        call = next(self._turns).Generate(generate_request(request, self._model))
        try:
            async for response in call:
                yield chunk_of(response.event)
        except grpc.aio.AioRpcError as error:
            raise _target_error(error) from None
        finally:
            call.cancel()  # does nothing to a call that has ended

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)


def generate_request(request: BenchRequest, model: str) -> pb.GenerateRequest:
    """The protobuf message of a benchmark's request."""
    message = pb.GenerateRequest(
        model=model,
        sampling=pb.SamplingParams(temperature=request.temperature, seed=request.seed),
        stop=pb.StopParams(max_tokens=request.output_tokens, ignore_eos=request.ignore_eos),
    )
    if isinstance(request.prompt, str):
        message.text = request.prompt
    else:
        message.token_ids.ids.extend(request.prompt)
    return message


def chunk_of(event: pb.StreamEvent) -> Chunk:
    """What one stream event brought. Tokens are counted by their ids: text may lag behind them."""
    num_tokens = sum(len(delta.token_ids) for delta in event.deltas)
    reason = max((delta.finish_reason for delta in event.deltas), default=pb.FINISH_REASON_UNSPECIFIED)
    finish_reason = pb.FinishReason.Name(reason) if reason != pb.FINISH_REASON_UNSPECIFIED else None
    if not event.HasField("usage"):
        return Chunk(num_tokens, finish_reason)
    usage = event.usage
    ledger = ServerLedger(
        usage.cached_tokens, usage.queued_seconds, usage.prefill_seconds, usage.decode_seconds, usage.preemptions
    )
    return Chunk(num_tokens, finish_reason, usage.prompt_tokens, ledger)


def _target_error(error: grpc.aio.AioRpcError) -> TargetError:
    return TargetError(error.code().name, error.details() or "")
