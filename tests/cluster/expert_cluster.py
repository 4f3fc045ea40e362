"""A whole control plane in this process: rank servers, links and a gateway's server, all real. Only what an engine
would know of its experts is made up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import grpc
from tests.edge.fakes import served

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.operations import ClusterOperations
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos.experts import (
    ExpertsReport,
    LayerExperts,
    PlacementRequest,
    RankExperts,
    RebalanceDecision,
    RebalancerState,
)
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLimits, EngineLoad

SECRET = "s3cret"
RUNNING = 3  # sequences on each rank
DENSE = ExpertsReport("DenseModel", 0, 0, 0.0, (), (RankExperts(0, 0, 0.0, 0.0, 1.5, 30, 0),))
DECISIONS = (
    RebalanceDecision(95.0, "load", (1,), "gain below cost", "refused", 0, 0.01, 0.05, times=4),
    RebalanceDecision(61.5, "load", (1, 2), "layer 1 is uneven", "kept", 3 * 2**20, 2.5, 0.25, 0.004, 2.25),
    RebalanceDecision(3.0, "operator", (2,), "asked for", "loading", 2**20),
)


def report_of(num_experts: int, num_ranks: int = 2, num_layers: int = 2, hot: int = 1) -> ExpertsReport:
    """Decoder layers 1, 2, ...; expert ``hot`` takes half of each layer's rows and has a replica on the last rank."""
    per_rank = num_experts // num_ranks + 1
    slots = [
        (*range(rank * (per_rank - 1), (rank + 1) * (per_rank - 1)), hot if rank == num_ranks - 1 else -1)
        for rank in range(num_ranks)
    ]
    load = tuple(10 * (num_experts - 1) if expert == hot else 10 + expert for expert in range(num_experts))
    layers = tuple(
        LayerExperts(1 + i, load, tuple(slots), tuple(sum(load) // num_ranks + 10 * r for r in range(num_ranks)))
        for i in range(num_layers)
    )
    ranks = tuple(
        RankExperts(r, 1000 * (r + 1), 2.0 + r, 0.5 * r, 4.0, 128, 10 * (r + 1), 77) for r in range(num_ranks)
    )
    state = RebalancerState(True, "observing", 3 * 2**20, 2, 1)
    return ExpertsReport("MixtureModel", num_experts, per_rank, 10.0, layers, ranks, state, DECISIONS)


@dataclass
class FakeGroup:
    """One group of one rank server, which keeps what it is asked to place, or refuses with ``refusal``. It thinks for
    ``delay_s`` before it reports."""

    name: str
    report: ExpertsReport
    epoch: int = 3
    refusal: Exception | None = None
    delay_s: float = 0.0
    asked: list[PlacementRequest] = field(default_factory=list)
    entry: GroupEntry | None = None  # once it serves

    def experts(self) -> ExpertsReport:
        time.sleep(self.delay_s)
        return self.report

    def request_placement(self, request: PlacementRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(request)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[RankServer]:
        rank = RankServer(
            lambda data: None,
            EngineLimits(vocab_size=100, max_context=64, max_waiting=4),
            EngineLoad(num_running=RUNNING, num_waiting=1, kv_blocks_used=5, kv_blocks_total=64, num_steps=128),
            SECRET,
            self.epoch,
            experts=self.experts,
            request_placement=self.request_placement,
        )
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        rank_pb2_grpc.add_RankServiceServicer_to_server(rank, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        num_ranks = len(self.report.ranks)
        leader = RankEntry(0, 0, RankState.SERVING, address, resident_bytes=2**30)
        peers = tuple(RankEntry(0, tp_rank, RankState.SERVING) for tp_rank in range(1, num_ranks))
        self.entry = GroupEntry(self.name, 1, num_ranks, self.epoch, (leader, *peers))
        try:
            yield rank
        finally:
            await server.stop(0)


@dataclass(frozen=True)
class Cluster:
    groups: Sequence[FakeGroup]
    ranks: Sequence[RankServer]
    operations: ClusterOperations
    core: RequestCore
    address: str

    def lose(self, group: FakeGroup) -> None:
        """The directory says so; the gateway's links are as they were."""
        assert group.entry is not None
        lost = replace(group.entry, ranks=tuple(replace(r, state=RankState.LOST) for r in group.entry.ranks))
        self.operations.update([lost if each is group else each.entry for each in self.groups if each.entry])


@contextlib.asynccontextmanager
async def cluster(*groups: FakeGroup) -> AsyncIterator[Cluster]:
    async with contextlib.AsyncExitStack() as stack:
        ranks = [await stack.enter_async_context(group.serving()) for group in groups]
        backend = ClusterBackend("gw", SECRET)
        stack.push_async_callback(backend.close)
        operations = ClusterOperations(backend)
        entries = [group.entry for group in groups if group.entry is not None]
        operations.update(entries)
        backend.update(entries)
        async with asyncio.timeout(10):
            while [load.num_running for load in backend.loads().values()] != [RUNNING] * len(groups):  # noqa: ASYNC110
                await asyncio.sleep(0.005)  # nothing here signals
        core = RequestCore([served()])
        server = GrpcServer(core, operations, "test", GrpcOptions(host="127.0.0.1", port=0))
        port = await server.start()
        stack.push_async_callback(server.stop, 0)
        yield Cluster(groups, ranks, operations, core, f"127.0.0.1:{port}")


@contextlib.contextmanager
def in_thread(*groups: FakeGroup) -> Iterator[Cluster]:
    """The same on a loop of its own, for callers that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = cluster(*groups)

    def on_loop(work: object) -> Cluster:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)  # type: ignore[arg-type]

    it = on_loop(context.__aenter__())
    try:
        yield it
    finally:
        on_loop(context.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
