"""A machine that vanishes closes no connection. A stopped process stands for it: its kernel still acknowledges."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import grpc
from tests.cluster.test_rank_link import Rank

from moestro.cluster.ranks.server import CHANNEL_OPTIONS
from moestro.protos.gen import rank_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"grpc.keepalive_time_ms": 500, "grpc.keepalive_timeout_ms": 500, "grpc.http2.ping_timeout_ms": 500}

GATEWAY = """
import asyncio, sys
from moestro.cluster.ranks.link import RankLink
from moestro.protos.sequences import SamplingParams, SequenceRequest

async def main():
    link = RankLink(sys.argv[1], "gateway", "s3cret", 2, lambda link: None)
    await link.connect()
    link.start([SequenceRequest("r", (1, 2, 3), SamplingParams(max_tokens=4))])
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_rank_of_a_gateway_that_vanished_frees_what_it_ran() -> None:
    async def scenario() -> None:
        rank = Rank()
        server = grpc.aio.server(options=tuple((dict(CHANNEL_OPTIONS)).items()))
        rank_pb2_grpc.add_RankServiceServicer_to_server(rank.server, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        command = [sys.executable, "-c", GATEWAY, f"127.0.0.1:{port}"]
        gateway = await asyncio.create_subprocess_exec(*command, env={"PYTHONPATH": f"{ROOT / 'src'}"})
        try:
            async with asyncio.timeout(60):
                while not rank.requests:  # noqa: ASYNC110 - nothing here signals
                    await asyncio.sleep(0.05)
            assert rank.cancelled == []
            gateway.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(20):
                while not rank.cancelled:  # noqa: ASYNC110 - nothing here signals
                    await asyncio.sleep(0.05)
            assert rank.cancelled == [each.sequence_id for each in rank.requests]
        finally:
            gateway.kill()
            await gateway.wait()
            await server.stop(0)

    asyncio.run(scenario())


def test_both_ends_notice_within_ten_seconds() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"] < 10_000
    # or the pings of one end would be too many for the other
    assert options["grpc.http2.min_ping_interval_without_data_ms"] < options["grpc.keepalive_time_ms"]
