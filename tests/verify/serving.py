"""A real gRPC server in this process over one engine, to be verified like a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cluster.config import load_config
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.stub import StubCluster
from moestro.cluster.gateway import edge_limits, served_model
from moestro.cluster.local_backend import LocalBackend
from moestro.cluster.serving.rank_spec import rank_spec
from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.workers import epoch
from moestro.workers.full_group import build_rank
from moestro.workers.rank_setup import runner_over
from moestro.workers.runner import Model, Runner, StepRunner

Change = Callable[[Model], Model]


class OneRank(StubCluster):
    async def status(self) -> pb.GetClusterStatusResponse:
        rank = pb.Rank(name="local", state=pb.RANK_STATE_SERVING)
        return pb.GetClusterStatusResponse(groups=[pb.Group(name="only", dp=1, tp=1, ranks=[rank])])

    async def experts(self, request: pb.GetExpertsRequest) -> pb.GetExpertsResponse:
        raise InvalidRequest([FieldViolation("group", "has one rank: nothing to place")])


@contextlib.asynccontextmanager
async def serving(model: Path | None, dtype: str, change: Change = lambda model: model) -> AsyncIterator[str]:
    """The address of a server of ``model`` (None: the bundled demo), or of what ``change`` makes of it."""
    torch.set_num_threads(1)
    config = load_config(None, {"cluster": {"dp": 1}, "model": {"path": model, "dtype": dtype}})
    formed = threading.Event()

    def changed_runner(*args: Any) -> StepRunner:
        runner = runner_over(*args)
        assert isinstance(runner, Runner)
        formed.set()
        return replace(runner, model=change(runner.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch, "runner_over", changed_runner)
        rank = build_rank(rank_spec(config))
        backend = LocalBackend(rank)
        await asyncio.to_thread(formed.wait)
    core = RequestCore([served_model(config, backend)], edge_limits(config))
    server = GrpcServer(core, OneRank(), "test", GrpcOptions(host="127.0.0.1", port=0))
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        core.close()
        await backend.close()
