"""Clients that do not read are cut off, over real sockets: their neighbours go on, nothing is held, they can resume."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
from benchmarks.paced_gateway import paced_gateway
from benchmarks.paced_rank import Pace, PacedRank, config
from tests.edge.fakes import served
from tests.edge.serving import run
from tests.edge.stalled_client import StalledClient

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.slow_consumers import LOOK_S
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc


@dataclass
class Rig:
    rank: PacedRank
    core: RequestCore
    server: GrpcServer
    stub: pb_grpc.InferenceServiceStub

    async def cut(self, count: int = 1) -> None:
        """Waits until so many clients have been cut off."""
        await until(lambda: self.server.slow.num_cut >= count)


@contextlib.asynccontextmanager
async def rig(**limits: float) -> AsyncIterator[Rig]:
    """A gateway before one fast rank. At the end nothing may be open."""
    rank = PacedRank(config(seats=8, max_context=4096), Pace(step_s=0.002, token_s=0.0))
    options = GrpcOptions(**limits)  # type: ignore[arg-type]
    async with rank.serving() as group, paced_gateway(group, served(), options=options) as gateway:
        core = gateway.core
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            yield Rig(rank, core, gateway.server, pb_grpc.InferenceServiceStub(channel))
            await until(lambda: not core.num_open and not rank.scheduler.has_work)
            rank.scheduler.check_integrity()
            assert rank.scheduler.load().kv_blocks_used == 0
            assert core.permits["fake"].num_open == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0.01)


def ask(name: str, max_tokens: int = 700) -> pb.GenerateRequest:
    stop = pb.StopParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=name, request_id=name, sampling=pb.SamplingParams(seed=1), stop=stop)


def tokens(events: list[pb.StreamEvent]) -> list[int]:
    return [token for event in events for delta in event.deltas for token in delta.token_ids]


def test_one_that_stalls_is_cut_and_its_neighbour_is_not() -> None:
    async def test() -> None:
        async with rig(stall_s=1.0) as it:
            slow = await StalledClient.call(it.server.port, ask("slow"))
            began_s = time.monotonic()
            neighbour = asyncio.create_task(collect(it.stub, ask("neighbour", max_tokens=300)))
            await it.cut()
            assert time.monotonic() - began_s >= 1.0
            await until(lambda: it.core.num_open <= 1)  # the neighbour, if it has not come to its end
            assert len(tokens(await neighbour)) == 300
            events, trailers = await slow.read_on()
            assert 0 < len(events) < 60  # what was under way; the rest was never made into messages
            assert b"grpc-status\x018" in trailers
            assert b"nothing was read for 1 s" in trailers
            resumed = ask("slow")
            resumed.resume.last_sequence_number = events[-1].sequence_number
            rest = await collect(it.stub, resumed)
            numbers = [event.sequence_number for event in (*events, *rest)]
            assert numbers == list(range(len(numbers)))
            assert len(tokens(events) + tokens(rest)) == 700
            assert it.server.slow.num_cut == 1
            await slow.hang_up()

    run(test())


def test_one_for_whom_too_much_is_held_is_cut_before_it_has_stalled() -> None:
    async def test() -> None:
        async with rig(stall_s=60.0, max_unread_tokens=100) as it:
            slow = await StalledClient.call(it.server.port, ask("slow"))
            await it.cut()
            written = it.rank.scheduler.load().num_steps
            assert written < 100 + 60 + 3 * LOOK_S / 0.002  # held, under way, and until it was looked at
            _, trailers = await slow.read_on()
            assert b"tokens wait to be read, at most 100 may" in trailers
            await slow.hang_up()

    run(test())


def test_one_that_never_reads_again_holds_nothing_and_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with rig(stall_s=0.3) as it:
            before = len(asyncio.all_tasks())
            slow = [await StalledClient.call(it.server.port, ask(f"slow-{i}")) for i in range(3)]
            await it.cut(3)
            await until(lambda: it.core.num_open == 0)
            assert len(tokens(await collect(it.stub, ask("next", max_tokens=20)))) == 20
            for each in slow:
                await each.hang_up()
            await until(lambda: len(asyncio.all_tasks()) <= before)

    run(test())


def test_a_client_that_reads_slowly_but_steadily_is_left_alone() -> None:
    async def test() -> None:
        async with rig(stall_s=0.6) as it:
            got = 0
            async for response in it.stub.Generate(ask("steady", max_tokens=40)):
                got += len(tokens([response.event]))
                await asyncio.sleep(0.04)
            assert got == 40
            assert it.server.slow.num_cut == 0

    run(test())


async def collect(stub: pb_grpc.InferenceServiceStub, request: pb.GenerateRequest) -> list[pb.StreamEvent]:
    return [response.event async for response in stub.Generate(request)]
