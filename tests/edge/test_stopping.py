"""How a server goes: told to every connection, waited for by what is open, and honest to what outlasts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.edge.fakes import LIMITS, SMALL, served
from tests.edge.serving import Refusal, refusal, rig, run

from moestro.cluster.client import AsyncClient
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.stub import StubBackend, StubCluster
from moestro.cluster.serving.ports import check_port
from moestro.protos.gen import inference_pb2 as pb


def ask(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="abc", sampling=pb.SamplingParams(seed=5), stop=pb.StopParams(max_tokens=max_tokens, ignore_eos=True)
    )


async def events_until_refused(call: Any) -> tuple[int, Refusal | None]:
    """How many events came, and what ended the stream before its time."""
    count = 0
    try:
        async for _ in call:
            count += 1
    except grpc.aio.AioRpcError as error:
        return count, refusal(error)
    return count, None


@pytest.mark.parametrize("streamed", [True, False])
def test_what_outlasts_the_grace_period_is_told_to_come_back(streamed: bool) -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.02)) as it:
            if streamed:
                asked = asyncio.create_task(events_until_refused(it.stub.Generate(ask(200))))
            else:
                asked = asyncio.create_task(_refusal_of(it.stub.Complete(pb.CompleteRequest(request=ask(200)))))
            await asyncio.sleep(0.2)
            assert it.backend.open_sequences
            await it.server.stop(0.4)
            count, said = await asked
            assert said is not None
            assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert said.message == "this gateway is stopping"
            assert said.retry_s is not None
            assert 0 < said.retry_s <= 1
            assert 0 < count < 200 or not streamed
            assert not it.backend.open_sequences

    run(test())


async def _refusal_of(call: Any) -> tuple[int, Refusal | None]:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return 0, refusal(error)
    return 0, None


def test_new_calls_of_an_old_connection_go_to_the_next_server() -> None:
    """Two gateways on one port, as while one replaces the other: the connection hears GOAWAY at once."""

    async def test() -> None:
        options = GrpcOptions(host="127.0.0.1", port=check_port("127.0.0.1", 0), reuse_port=True)
        backends = [StubBackend(LIMITS, step_s=0.01) for _ in range(2)]
        servers = [
            GrpcServer(RequestCore([served(each, None)], SMALL), StubCluster(), "test", options) for each in backends
        ]
        await servers[0].start()
        async with AsyncClient(f"127.0.0.1:{options.port}") as client:
            stream = client.stream("abc", seed=5, max_tokens=100, ignore_eos=True)
            await anext(stream)
            await servers[1].start()
            stopping = asyncio.create_task(servers[0].stop(10.0))
            rest = asyncio.create_task(_count(stream))
            for _ in range(200):
                if backends[1].num_started:
                    break
                assert (await client.generate("abc", seed=5, max_tokens=1)).choices
            assert backends[1].num_started
            assert not rest.done()
            assert await rest == 99
            await stopping
        await servers[1].stop(0)

    run(test())


async def _count(stream: AsyncIterator[object]) -> int:
    return len([event async for event in stream])


def test_a_stop_waits_for_nobody_who_only_watches_its_health() -> None:
    async def test() -> None:
        async with rig() as it:
            watch = aiter(health_pb2_grpc.HealthStub(it.channel).Watch(health_pb2.HealthCheckRequest()))  # type: ignore[no-untyped-call]
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
            began_s = time.monotonic()
            await it.server.stop(60.0)
            assert time.monotonic() - began_s < 20.0
            assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING

    run(test())


def test_a_stop_waits_for_nobody_who_has_left() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.01)) as it:
            call = it.stub.Generate(ask(200))
            await anext(aiter(call))
            call.cancel()
            began_s = time.monotonic()
            await it.server.stop(60.0)
            assert time.monotonic() - began_s < 20.0

    run(test())
