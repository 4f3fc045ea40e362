"""The gRPC target against a real server with known delays.

Upper bounds are wide, for a busy machine; lower bounds are what the server really waited, less the timer's grain.
"""

from __future__ import annotations

import asyncio
import statistics

import pytest
from tests.bench.stub_server import ITL_S, TTFT_S, VOCAB_SIZE, stub_server

from moestro.cluster.bench.arrivals import ClosedLoop, Extent, OpenLoop
from moestro.cluster.bench.driver import TIMEOUT, run_scheduled
from moestro.cluster.bench.grpc_target import GrpcTarget, chunk_of, generate_request
from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.plan import Plan
from moestro.cluster.bench.run import run_plan
from moestro.cluster.bench.target import Chunk, TargetError
from moestro.cluster.bench.workload import BenchRequest
from moestro.protos.gen import inference_pb2 as pb

GRAIN_S = 0.002


def request(index: int, output_tokens: int, prompt=(1, 2, 3)) -> BenchRequest:
    return BenchRequest(index, prompt, 3, output_tokens, True, 0.0, 42)


def drive(requests, times_s=None, *, timeout_s=20.0, **options):
    async def go():
        async with stub_server() as (service, address):
            target = GrpcTarget(address, **options)
            try:
                await target.describe()
                run = await run_scheduled(target, requests, times_s or [0.0] * len(requests), timeout_s=timeout_s)
            finally:
                await target.close()
            await asyncio.sleep(0.05)  # the server learns of a cancelled call a moment later
            return run, service

    return asyncio.run(go())


def test_times_are_those_the_server_took():
    run, _ = drive([request(i, 6) for i in range(8)], [0.05 * i for i in range(8)])
    assert all(r.error is None and r.output_tokens == 6 for r in run.records)
    first = [r.ttft_s for r in run.records]
    gaps = [gap for r in run.records for gap in r.itl_s()]
    assert min(first) > TTFT_S - GRAIN_S
    assert TTFT_S - GRAIN_S < statistics.median(first) < TTFT_S + 0.06
    assert len(gaps) == 40
    assert ITL_S - GRAIN_S < statistics.median(gaps) < ITL_S + 0.03
    for r in run.records:
        whole = TTFT_S + 5 * ITL_S
        assert whole - GRAIN_S < r.e2e_s < whole + 1.0
        assert r.tpot_s == pytest.approx(sum(r.itl_s()) / 5)


def test_what_the_server_says_arrives():
    run, service = drive([request(0, 2)])
    (r,) = run.records
    assert (r.finish_reason, r.input_tokens) == ("FINISH_REASON_LENGTH", 3)
    assert r.ledger is not None
    assert (r.ledger.cached_tokens, r.ledger.queued_s, r.ledger.preemptions) == (1, 0.5, 2)
    (seen,) = service.requests
    assert list(seen.token_ids.ids) == [1, 2, 3]
    assert (seen.stop.max_tokens, seen.stop.ignore_eos) == (2, True)
    assert seen.sampling.HasField("temperature")
    assert (seen.sampling.temperature, seen.sampling.seed) == (0.0, 42)


def test_errors_are_counted_by_code_and_neighbours_are_unharmed():
    run, service = drive([request(i, n) for i, n in enumerate([2, 13, 14, 15, 2])], timeout_s=1.0)
    codes = [None, "RESOURCE_EXHAUSTED", "INTERNAL", TIMEOUT, None]
    assert [r.error for r in run.records] == codes
    assert run.records[1].error_message == "32 requests wait already"
    assert [r.output_tokens for r in run.records] == [2, 0, 2, 0, 2]
    assert service.cancelled == 1, "a request that timed out must not keep running on the server"


def test_requests_take_turns_on_the_connections():
    for channels in (1, 3):
        _, service = drive([request(i, 1) for i in range(6)], channels=channels)
        assert len(service.peers) == channels


def test_text_prompts_are_sent_as_text():
    message = generate_request(request(0, 5, "def f(x):"), "m")
    assert (message.WhichOneof("prompt"), message.text, message.model) == ("text", "def f(x):", "m")


def test_tokens_are_counted_over_all_deltas_and_not_by_text():
    event = pb.StreamEvent(deltas=[pb.ChoiceDelta(token_ids=[1, 2]), pb.ChoiceDelta(text="held back", token_ids=[3])])
    assert chunk_of(event) == Chunk(3)
    assert chunk_of(pb.StreamEvent(deltas=[pb.ChoiceDelta(text="tail")])) == Chunk(0)


@pytest.mark.parametrize(("model", "code"), [("stub", None), ("", None), ("other", "NOT_FOUND")])
def test_describe(model, code):
    async def go():
        async with stub_server() as (_, address):
            target = GrpcTarget(address, model)
            try:
                return await target.describe()
            finally:
                await target.close()

    if code is None:
        info = asyncio.run(go())
        assert (info.kind, info.model, info.version) == ("moestro-grpc", "stub", "1.2.3")
        assert (info.vocab_size, info.max_context, info.dtype) == (VOCAB_SIZE, 256, "bf16")
    else:
        with pytest.raises(TargetError, match="--model must be one of stub, got 'other'"):
            asyncio.run(go())


def test_nobody_there_is_an_error_and_not_a_report():
    async def go():
        target = GrpcTarget("127.0.0.1:1")
        try:
            await target.describe()
        finally:
            await target.close()

    with pytest.raises(TargetError, match="UNAVAILABLE"):
        asyncio.run(go())


@pytest.mark.parametrize("load", [ClosedLoop(4), OpenLoop(40.0)])
def test_a_whole_benchmark(load):
    async def go():
        async with stub_server() as (service, address):
            target = GrpcTarget(address)
            try:
                plan = Plan(load, Extent(12), parse_lengths("--output", "3"), parse_lengths("--input", "20"), warmup=2)
                return await run_plan(plan, target), service
            finally:
                await target.close()

    report, service = asyncio.run(go())
    m = report.rounds[0].metrics
    assert len(service.requests) == 14
    assert (m.completed, m.input_tokens, m.output_tokens) == (12, 240, 36)
    assert all(token < VOCAB_SIZE for seen in service.requests for token in seen.token_ids.ids)
    assert m.ttft_s is not None
    assert TTFT_S - GRAIN_S < m.ttft_s.p50 < TTFT_S + 0.1
