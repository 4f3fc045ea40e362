"""The simulated network and clock keep the promises that the real ones make."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from moestro.cluster.simulation.network import Network
from moestro.cluster.simulation.rpc import KEEPALIVE_S, SimulatedServer, Sockets
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import NothingWillHappen, Process, run_virtual


class World:
    """A client and a server that counts, or waits for ever."""

    def __init__(self, seed: int) -> None:
        self.failures: list[BaseException] = []
        self.network = Network(random.Random(seed), Trace())
        self.sockets = Sockets(self.network)
        self.client = Process("client", self.failures.append)
        self.server = Process("server", self.failures.append)
        self.num_cancelled = 0
        for process in (self.client, self.server):
            process.at_death(lambda process=process: self.sockets.lose(process))  # type: ignore[misc]
        server = SimulatedServer(self.sockets, self.server, "here")
        handler = grpc.unary_stream_rpc_method_handler(self._count)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", {"Count": handler}),))
        server.start()

    async def _count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            for number in range(int(request)):
                yield b"%d" % number
            await asyncio.sleep(1000.0)
        finally:
            self.num_cancelled += 1

    def read(self, count: int, **options: Any) -> Awaitable[list[bytes]]:
        async def work() -> list[bytes]:
            call = self.sockets.channel("here").unary_stream("/service/Count")(b"%d" % count, **options)
            return [await call.read() for _ in range(count)] + [await call.read()]

        return self.client.spawn(work())


def ends(disturb: Callable[[World], None], **options: Any) -> tuple[grpc.StatusCode, float]:
    """How a call ends that is disturbed after a second, and when."""

    async def run() -> tuple[grpc.StatusCode, float]:
        world = World(1)
        reading = world.read(3, **options)
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, disturb, world)
        keeping = asyncio.create_task(world.sockets.keep_alive())
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await reading
        keeping.cancel()
        ended_s = loop.time()
        await asyncio.sleep(1.0)
        assert world.num_cancelled == 1
        return failed.value.code(), ended_s

    return run_virtual(run())


def test_a_killed_server_is_noticed_at_once() -> None:
    code, ended_s = ends(lambda world: world.server.kill())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert 1.0 < ended_s < 1.1


def test_a_partition_is_noticed_by_the_keepalive() -> None:
    code, ended_s = ends(lambda world: world.network.part(world.client, world.server))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert KEEPALIVE_S <= ended_s - 1.0 <= KEEPALIVE_S + 3.0


def test_a_deadline_ends_the_call_and_its_handler() -> None:
    assert ends(lambda world: None, timeout=2.0) == (grpc.StatusCode.DEADLINE_EXCEEDED, 2.0)


def test_messages_of_one_pipe_come_in_order_and_of_two_they_overtake() -> None:
    async def run() -> list[tuple[int, int]]:
        world, heard = World(2), []
        for pipe in (0, 1):
            line = world.network.pipe(world.client, world.server)
            for number in range(50):
                line.send(lambda pipe=pipe, number=number: heard.append((pipe, number)))  # type: ignore[misc]
        await asyncio.sleep(1.0)
        return heard

    heard = run_virtual(run())
    for pipe in (0, 1):
        assert [number for which, number in heard if which == pipe] == list(range(50))
    assert heard != sorted(heard)


def test_what_a_stopped_process_is_sent_waits_for_it() -> None:
    async def run() -> list[float]:
        world, heard = World(3), []
        loop = asyncio.get_running_loop()
        world.network.stop(world.server)
        world.network.pipe(world.client, world.server).send(lambda: heard.append(loop.time()))
        loop.call_later(5.0, world.network.resume, world.server)
        await asyncio.sleep(10.0)
        return heard

    assert run_virtual(run()) == [5.0]


def test_waiting_for_nothing_is_an_error() -> None:
    with pytest.raises(NothingWillHappen):
        run_virtual(asyncio.Event().wait())  # type: ignore[arg-type]
