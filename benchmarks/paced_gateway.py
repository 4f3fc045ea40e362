"""A gateway on real sockets before a paced rank, in one process or in two: for what overload does."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from benchmarks.gateway import make_tokenizer, served_model
from benchmarks.paced_rank import SECRET, Pace, PacedRank, config

from moestro.cluster.backend import Capacity
from moestro.cluster.directory import GroupEntry
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits, ServedModel
from moestro.cluster.edge.stub import StubCluster
from moestro.cluster.edge.tickets import AdmissionLimits
from moestro.cluster.heap import freeze_heap
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.protos.sequences import UNBOUNDED


class Unlimited(ClusterBackend):
    """Nothing waits at the gateway: everything goes to the ranks' own lines."""

    def capacity(self) -> Capacity:
        super().capacity()
        return Capacity(UNBOUNDED, UNBOUNDED)


@dataclass
class PacedGateway:
    backend: ClusterBackend
    core: RequestCore
    server: GrpcServer

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextlib.asynccontextmanager
async def paced_gateway(
    group: GroupEntry,
    model: ServedModel,
    limits: EdgeLimits | None = None,
    options: GrpcOptions | None = None,
    kind: type[ClusterBackend] = ClusterBackend,
) -> AsyncIterator[PacedGateway]:
    """Serves ``model``, whose own backend is not used, on a free port."""
    backend = kind("gateway", SECRET)
    backend.update([group])
    await backend.wait_attached()
    core = RequestCore([replace(model, backend=backend)], limits)
    server = GrpcServer(core, StubCluster(), "paced", replace(options or GrpcOptions(), host="127.0.0.1", port=0))
    await server.start()
    try:
        yield PacedGateway(backend, core, server)
    finally:
        await server.stop(0)
        await backend.close()


def rank_process(pipe: Connection, seats: int, pace: Pace) -> None:
    """Sends the group it is, then how many sequences it has prefilled and its steps since, whenever asked; until None
    comes."""

    async def run() -> None:
        rank = PacedRank(config(seats), pace)
        async with rank.serving() as group:
            pipe.send(group)
            while await asyncio.to_thread(pipe.recv) is not None:
                pipe.send((len(rank.prefilled), tuple(rank.steps)))
                rank.prefilled.clear()
                rank.steps.clear()

    asyncio.run(run())


def gateway_process(pipe: Connection, group: GroupEntry, limits: AdmissionLimits, has_admission: bool) -> None:
    """Sends its address, then its resident bytes and counts of refusals, whenever asked; until None comes."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            make_tokenizer(Path(scratch))
            model = served_model(Path(scratch), max_context=1024)
        edge = EdgeLimits(max_open_requests=100_000, admission=limits)
        kind = ClusterBackend if has_admission else Unlimited
        async with paced_gateway(group, model, edge, kind=kind) as it:
            (permits,) = it.core.permits.values()
            freeze_heap()
            pipe.send(it.address)
            while await asyncio.to_thread(pipe.recv) is not None:
                refused = {reason.value: count for reason, count in permits.counts.refused.items()}
                pipe.send((psutil.Process().memory_info().rss, refused))

    asyncio.run(run())
