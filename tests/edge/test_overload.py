"""Admission over real sockets: a gateway before a rank with few seats."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from benchmarks.paced_gateway import PacedGateway, paced_gateway
from benchmarks.paced_rank import Pace, PacedRank, config
from tests.edge.fakes import served
from tests.edge.serving import refused, run

from moestro.cluster.edge.grpc_services import CLIENT_KEY
from moestro.cluster.edge.served import EdgeLimits
from moestro.cluster.edge.tickets import AdmissionLimits, Refusal
from moestro.cluster.memory import Pressure
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc

STEP_S = 0.02


@dataclass
class Rig:
    """One seat, and one place in the rank's own line."""

    rank: PacedRank
    gateway: PacedGateway
    channel: grpc.aio.Channel

    @property
    def num_queued(self) -> int:
        return self.gateway.core.num_queued

    def ask(self, name: str, max_tokens: int = 20, client: str = "", timeout: float | None = None) -> asyncio.Task[Any]:
        """Asks at once; the task ends with the answer, or raises its status."""
        request = pb.GenerateRequest(
            text=name, request_id=name, stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=True)
        )
        metadata = ((CLIENT_KEY, client),) if client else ()
        stub = pb_grpc.InferenceServiceStub(self.channel)
        call = stub.Complete(pb.CompleteRequest(request=request), metadata=metadata, timeout=timeout)
        return asyncio.ensure_future(call)

    async def fill(self, max_tokens: int = 20) -> list[asyncio.Task[Any]]:
        """Takes all the rank has."""
        before = self.gateway.core.num_open
        tasks = [self.ask(f"fill-{number}", max_tokens) for number in range(2)]
        await until(lambda: self.gateway.core.num_open == before + 2)
        await until(lambda: self.rank.scheduler.load().num_running == 1)
        return tasks

    def prefilled(self, name: str) -> bool:
        return any(f" {name}/" in each for each in self.rank.prefilled)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def rig(**limits: Any) -> AsyncIterator[Rig]:
    rank = PacedRank(config(seats=1), Pace(STEP_S, 0.0))
    edge = EdgeLimits(admission=AdmissionLimits(**limits))
    async with contextlib.AsyncExitStack() as stack:
        group = await stack.enter_async_context(rank.serving())
        gateway = await stack.enter_async_context(paced_gateway(group, served(), edge))
        yield Rig(rank, gateway, await stack.enter_async_context(grpc.aio.insecure_channel(gateway.address)))
        core = gateway.core
        await until(lambda: not core.num_open and not rank.scheduler.has_work)
        assert (core.num_queued, core.permits["fake"].num_open) == (0, 0)
        rank.scheduler.check_integrity()
        assert rank.scheduler.load().kv_blocks_used == 0


def test_what_has_no_place_is_refused_at_once_with_the_time_to_come_again() -> None:
    async def test() -> None:
        async with rig(max_queued=1) as it:
            running = await it.fill()
            waiting = it.ask("waiting")
            await until(lambda: it.num_queued == 1)
            status = await pb_grpc.ClusterServiceStub(it.channel).GetClusterStatus(pb.GetClusterStatusRequest())
            assert (status.open_streams, status.queued_requests) == (3, 1)
            began_s = time.monotonic()
            refusal = await refused(it.ask("one-too-many"))
            assert time.monotonic() - began_s < 0.3  # the two that run need 0.8 s
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            assert refusal.retry_s is not None
            assert 0 < refusal.retry_s < 60
            assert not waiting.done()
            answers = [await each for each in (*running, waiting)]
            assert [len(each.choices[0].token_ids) for each in answers] == [20, 20, 20]
            assert answers[2].usage.queued_seconds > 10 * STEP_S  # at the gateway and in the rank
            assert it.gateway.core.permits["fake"].counts.refused == {Refusal.FULL: 1}

    run(test())


def test_one_client_s_flood_does_not_delay_another_s_request() -> None:
    async def test() -> None:
        async with rig(quantum=16) as it:
            await it.fill()
            flood = [it.ask(f"flood-{number}", max_tokens=10, client="flood") for number in range(10)]
            await until(lambda: it.num_queued == 10)
            polite = await it.ask("polite", max_tokens=10, client="polite")
            assert polite.usage.output_tokens == 10
            assert sum(each.done() for each in flood) <= 4
            await asyncio.gather(*flood)

    run(test())


def test_work_whose_deadline_has_passed_is_never_prefilled() -> None:
    async def test() -> None:
        async with rig() as it:
            running = await it.fill(max_tokens=40)
            refusal = await refused(it.ask("late", timeout=0.3))
            assert refusal.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            await asyncio.gather(*running)
            assert (await it.ask("early", timeout=30)).usage.output_tokens == 20
            assert it.prefilled("early")
            assert not it.prefilled("late")

    run(test())


def test_one_that_leaves_the_line_leaves_nothing() -> None:
    async def test() -> None:
        async with rig() as it:
            running = await it.fill()
            gone = [it.ask(f"gone-{number}") for number in range(5)]
            await until(lambda: it.num_queued == 5)
            for each in gone:
                each.cancel()
            await until(lambda: it.num_queued == 0)
            await asyncio.gather(*running)
            assert not any(it.prefilled(f"gone-{number}") for number in range(5))

    run(test())


def test_a_stream_that_was_cut_off_does_not_wait_again() -> None:
    async def test() -> None:
        async with rig(max_queued=1) as it:
            stub = pb_grpc.InferenceServiceStub(it.channel)
            request = pb.GenerateRequest(text="a", request_id="cut", stop=pb.StopParams(max_tokens=30, ignore_eos=True))
            call = stub.Generate(request)
            first = await call.read()
            call.cancel()
            await until(lambda: it.gateway.core.num_open == 0)
            running = await it.fill()
            waiting = it.ask("waiting")
            await until(lambda: it.num_queued == 1)
            request.resume.last_sequence_number = first.event.sequence_number
            rest = [response.event async for response in stub.Generate(request)]
            numbers = [first.event.sequence_number, *(event.sequence_number for event in rest)]
            assert numbers == list(range(30))
            await asyncio.gather(*running, waiting)

    run(test())


def test_as_memory_runs_short_first_the_new_is_refused_then_what_waits_is_given_up() -> None:
    async def test() -> None:
        async with rig() as it:
            permits = it.gateway.core.permits["fake"]
            running = await it.fill()
            waiting = it.ask("waiting")
            await until(lambda: it.num_queued == 1)
            permits.set_pressure(Pressure.NEW)
            refusal = await refused(it.ask("new"))
            assert (refusal.code, refusal.message) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "memory runs short: nothing new is taken",
            )
            assert it.num_queued == 1
            permits.set_pressure(Pressure.WAITING)
            assert (await refused(waiting)).message == "memory runs short: nothing may wait"
            assert [(await each).usage.output_tokens for each in running] == [20, 20]
            permits.set_pressure(Pressure.NONE)
            assert (await it.ask("again")).usage.output_tokens == 20
            assert permits.counts.refused == {Refusal.MEMORY: 2}

    run(test())


def test_a_rank_whose_memory_runs_short_gets_nothing_new() -> None:
    async def test() -> None:
        async with rig() as it:
            running = await it.fill()
            waiting = it.ask("waiting")
            await until(lambda: it.num_queued == 1)
            it.rank.server.set_pressure(Pressure.NEW)
            await until(lambda: it.gateway.backend.capacity().sequences == 0)
            assert (await refused(it.ask("new"))).message == "memory runs short: nothing new is taken"
            await asyncio.gather(*running)
            assert not waiting.done()
            it.rank.server.set_pressure(Pressure.NONE)
            assert (await waiting).usage.output_tokens == 20

    run(test())
