"""A real gRPC server in this process over one engine of the bundled demo model, to be verified like a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import torch
from tests.edge.serving import run

from moestro.cluster.config import load_config
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.gateway import edge_limits, served_model
from moestro.cluster.local_backend import LocalBackend
from moestro.cluster.serving.rank_spec import rank_spec
from moestro.protos.gen import inference_pb2 as pb
from moestro.workers import rank_setup
from moestro.workers.model.decoder import Decoder

__all__ = ["run", "serving"]

Change = Callable[[Decoder], Decoder]


async def status() -> pb.GetClusterStatusResponse:
    rank = pb.Rank(name="local", state=pb.RANK_STATE_SERVING)
    return pb.GetClusterStatusResponse(groups=[pb.Group(name="only", dp=1, tp=1, ranks=[rank])])


@contextlib.asynccontextmanager
async def serving(dtype: str, change: Change = lambda model: model) -> AsyncIterator[str]:
    """The address of a server whose model is what ``change`` makes of the honest one."""
    torch.set_num_threads(1)
    config = load_config(None, {"cluster": {"dp": 1}, "model": {"dtype": dtype}})
    built = rank_setup.build_rank(rank_spec(config))
    runner = built.loop._engine.runner
    object.__setattr__(runner, "model", change(runner.model))  # type: ignore[arg-type]
    backend = LocalBackend(built)
    core = RequestCore([served_model(config, backend)], edge_limits(config))
    server = GrpcServer(core, status, "test", GrpcOptions(host="127.0.0.1", port=0))
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        core.close()
        await backend.close()
