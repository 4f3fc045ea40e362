"""Where the text of ``generate`` and ``chat`` comes from: a running cluster, or an engine in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from moestro.cluster.config import load_config
from moestro.protos.gen import inference_pb2 as pb

Ask = Callable[[pb.GenerateRequest | pb.ChatRequest], AsyncIterator[str]]


@asynccontextmanager
async def local_source(model: Path | None) -> AsyncIterator[Ask]:
    """The whole edge and one engine in this process, without Ray. Raises CheckpointError."""
    from moestro.cluster.edge.core import RequestCore
    from moestro.cluster.gateway import edge_limits, served_model
    from moestro.cluster.local_backend import LocalBackend
    from moestro.cluster.serving.specs import rank_spec
    from moestro.workers.rank_setup import build_rank

    config = load_config(None, {"model": {"path": model}, "cluster": {"dp": 1}})
    backend = LocalBackend(build_rank(rank_spec(config)))
    core = RequestCore([served_model(config, backend)], edge_limits(config))

    async def ask(request: pb.GenerateRequest | pb.ChatRequest) -> AsyncIterator[str]:
        async for event in core.stream(request):
            yield event.text

    try:
        yield ask
    finally:
        core.close()
        await backend.close()


@asynccontextmanager
async def cluster_source(address: str) -> AsyncIterator[Ask]:
    """A running cluster."""
    import grpc

    from moestro.protos.gen import inference_pb2_grpc

    channel = grpc.aio.insecure_channel(address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def ask(request):
        method = stub.Chat if isinstance(request, pb.ChatRequest) else stub.Generate
        async for message in method(request):
            for delta in message.event.deltas:
                yield delta.text

    yield ask
    await channel.close()
