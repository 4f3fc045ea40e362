"""A real ``grpc.aio`` server of the public interface that answers with delays known in advance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc

TTFT_S, ITL_S = 0.06, 0.025
VOCAB_SIZE = 100


class StubService(pb_grpc.InferenceServiceServicer):
    """Asked for 13 tokens it refuses, for 14 it breaks after two, for 15 it never answers; for any other number it
    sends them one a message, the last with usage."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.peers: set[str] = set()
        self.cancelled = 0

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(
            models=[pb.Model(name="stub", vocab_size=VOCAB_SIZE, max_context=256, dtype="bf16")]
        )

    async def GetServerInfo(self, request, context):
        return pb.GetServerInfoResponse(version="1.2.3")

    async def Generate(self, request, context):
        self.requests.append(request)
        self.peers.add(context.peer())
        asked = request.stop.max_tokens
        if asked == 13:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "32 requests wait already")
        if asked == 15:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        for number in range(asked):
            await asyncio.sleep(ITL_S if number else TTFT_S)
            if asked == 14 and number == 2:
                await context.abort(grpc.StatusCode.INTERNAL, "rank lost")
            yield pb.GenerateResponse(event=self._event(request, number, number == asked - 1))

    def _event(self, request: pb.GenerateRequest, number: int, is_last: bool) -> pb.StreamEvent:
        reason = pb.FINISH_REASON_LENGTH if is_last else pb.FINISH_REASON_UNSPECIFIED
        event = pb.StreamEvent(sequence_number=number, deltas=[pb.ChoiceDelta(token_ids=[7], finish_reason=reason)])
        if is_last:
            prompt_tokens = len(request.token_ids.ids) or 3
            event.usage.MergeFrom(
                pb.Usage(prompt_tokens=prompt_tokens, cached_tokens=1, queued_seconds=0.5, preemptions=2)
            )
        return event


@asynccontextmanager
async def stub_server() -> AsyncIterator[tuple[StubService, str]]:
    """The service and the address it answers at."""
    service, server = StubService(), grpc.aio.server()
    pb_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
