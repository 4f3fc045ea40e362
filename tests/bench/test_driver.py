"""The driver in virtual time: scripted servers, exact timelines."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench.virtual_time import run_virtual

from moestro.cluster.bench.driver import NO_OUTPUT, TIMEOUT, run_closed, run_scheduled
from moestro.cluster.bench.fake import FakeTarget, Step, steady
from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.records import ServerLedger
from moestro.cluster.bench.target import Chunk, TargetError
from moestro.cluster.bench.workload import BenchRequest, RandomPrompts, Workload


def requests(count: int, output: str = "3") -> list[BenchRequest]:
    workload = Workload(0, RandomPrompts((4,), 9), parse_lengths("--output", output))
    return [workload.request(i) for i in range(count)]


def test_open_loop_timelines_are_exact():
    run = run_virtual(run_scheduled(FakeTarget(steady(0.5, 0.25)), requests(3), (0.0, 0.1, 4.0), timeout_s=9))
    for r, due in zip(run.records, (0.0, 0.1, 4.0), strict=True):
        assert r.scheduled_s == due
        assert r.sent_s == pytest.approx(due)
        assert r.message_times_s == pytest.approx((due + 0.5, due + 0.75, due + 1.0))
        assert (r.ttft_s, r.tpot_s, r.e2e_s) == pytest.approx((0.5, 0.25, 1.0))
        assert (r.output_tokens, r.input_tokens, r.error) == (3, 4, None)
    assert max(run.loop_delays_s) < 1e-6


def test_an_open_loop_does_not_wait_for_a_slow_server():
    """The point of an open loop: one stuck request must not hold back the others (coordinated omission)."""

    def stuck_first(request: BenchRequest) -> list[Step]:
        return [Step(100.0 if request.index == 0 else 0.1, Chunk(1))]

    run = run_virtual(run_scheduled(FakeTarget(stuck_first), requests(5), (0.0, 1.0, 2.0, 3.0, 4.0), timeout_s=1e3))
    assert [r.sent_s for r in run.records] == pytest.approx([0, 1, 2, 3, 4])
    assert [r.done_s for r in run.records] == pytest.approx([100, 1.1, 2.1, 3.1, 4.1])


def test_a_late_load_generator_shows_in_lag_and_in_latency():
    def blocks_the_loop(request: BenchRequest) -> list[Step]:
        if request.index == 0:
            time.sleep(0.2)
        return [Step(0.0, Chunk(1))]

    run = asyncio.run(run_scheduled(FakeTarget(blocks_the_loop), requests(2, "1"), (0.0, 0.05), timeout_s=9))
    late = run.records[1]
    assert late.client_lag_s > 0.1
    assert late.ttft_s >= late.client_lag_s
    assert max(run.loop_delays_s) > 0.1


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 25), concurrency=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_closed_loop_keeps_its_number_in_flight_and_sends_each_once(count, concurrency, seed):
    durations = Workload(seed, RandomPrompts((1,), 9), parse_lengths("--output", "uniform:min=1,max=9"))
    todo = [durations.request(i) for i in range(count)]
    target = FakeTarget(steady(0.5, 0.25))
    run = run_virtual(run_closed(target, todo, concurrency, timeout_s=1e3))
    assert target.started == todo
    assert [r.index for r in run.records] == list(range(count))
    starts = sorted(r.sent_s for r in run.records)
    for number, start in enumerate(starts):
        in_flight = sum(r.sent_s <= start + 1e-9 < r.done_s for r in run.records)
        assert in_flight <= concurrency
        if number >= concurrency:
            ends = [r.done_s for r in run.records]
            assert min(abs(start - end) for end in ends) < 1e-9, "a client sends as soon as its last request ended"
    assert all(r.scheduled_s == r.sent_s for r in run.records)


def test_closed_loop_stops_sending_after_its_duration_and_waits_for_the_rest():
    target = FakeTarget(steady(0.4, 0.0))
    run = run_virtual(run_closed(target, requests(100, "1"), 2, timeout_s=9, duration_s=1.0))
    assert [r.sent_s for r in run.records] == pytest.approx([0, 0, 0.4, 0.4, 0.8, 0.8])
    assert max(r.done_s for r in run.records) == pytest.approx(1.2)


def test_failures_are_recorded_with_what_had_come():
    def script(request: BenchRequest) -> list[Step]:
        refused = [Step(0.1, TargetError("RESOURCE_EXHAUSTED", "queue full"))]
        broken = [Step(0.1, Chunk(2)), Step(0.1, TargetError("UNAVAILABLE", "connection lost"))]
        empty = [Step(0.1, Chunk(0, "EOS"))]
        stuck = [Step(0.1, Chunk(1)), Step(50.0, Chunk(1))]
        return [refused, broken, empty, stuck, [Step(0.1, Chunk(1))]][request.index]

    run = run_virtual(run_scheduled(FakeTarget(script), requests(5), [0.0] * 5, timeout_s=5.0))
    codes = ["RESOURCE_EXHAUSTED", "UNAVAILABLE", NO_OUTPUT, TIMEOUT, None]
    assert [r.error for r in run.records] == codes
    assert [r.error_message for r in run.records][:2] == ["queue full", "connection lost"]
    assert [r.output_tokens for r in run.records] == [0, 2, 0, 1, 1]
    assert run.records[3].done_s == pytest.approx(5.0)


def test_a_refusing_server_is_not_hammered():
    target = FakeTarget(lambda _: [Step(0.0, TargetError("UNAVAILABLE", "no"))])
    run = run_virtual(run_closed(target, requests(1000), 2, timeout_s=9, duration_s=1.0))
    assert len(run.records) == pytest.approx(2 * 1.0 / 0.05, abs=2)


def test_a_timeout_closes_the_request():
    closed = []

    class Stuck(FakeTarget):
        async def run(self, request):
            try:
                await asyncio.sleep(100)
                yield Chunk(1)
            finally:
                closed.append(request.index)

    run_virtual(run_scheduled(Stuck(steady(0, 0)), requests(2), (0.0, 0.0), timeout_s=1.0))
    assert sorted(closed) == [0, 1]


def test_what_the_server_says_is_kept():
    ledger = ServerLedger(cached_tokens=2, queued_s=0.5)
    steps = [Step(0.1, Chunk(1)), Step(0.1, Chunk(0)), Step(0.1, Chunk(1, "LENGTH", 7, ledger))]
    (r,) = run_virtual(run_scheduled(FakeTarget(lambda _: steps), requests(1), (0.0,), timeout_s=5.0)).records
    assert (r.finish_reason, r.input_tokens, r.ledger) == ("LENGTH", 7, ledger)
    assert r.message_tokens == (1, 1), "a message without tokens is not a point of the timeline"


def test_a_fault_of_the_benchmark_itself_is_not_counted_as_the_servers():
    class Broken(FakeTarget):
        async def run(self, request):
            raise ValueError("a bug")
            yield

    with pytest.raises(ExceptionGroup) as caught:
        run_virtual(run_scheduled(Broken(steady(0, 0)), requests(1), (0.0,), timeout_s=5.0))
    assert caught.group_contains(ValueError, match="a bug")
