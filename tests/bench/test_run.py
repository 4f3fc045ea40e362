"""Whole benchmarks against scripted servers in virtual time: plan in, report out."""

from __future__ import annotations

import pytest
from tests.bench.virtual_time import run_virtual

from moestro.cluster.bench.arrivals import Burst, ClosedLoop, Extent, OpenLoop, Replay
from moestro.cluster.bench.fake import FakeTarget, Step, steady
from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.plan import Plan, choose_extent, choose_lengths, choose_load
from moestro.cluster.bench.report import Report
from moestro.cluster.bench.run import run_plan
from moestro.cluster.bench.slo import Slo
from moestro.cluster.bench.target import Chunk, TargetError
from moestro.cluster.bench.trace import Trace
from moestro.protos.errors import ConfigError

LENGTHS = parse_lengths("--output", "uniform:min=2,max=6")


def plan(**changes: object) -> Plan:
    values = {"load": OpenLoop(5.0), "extent": Extent(20), "output": LENGTHS, "input": LENGTHS, "seed": 3} | changes
    return Plan(**values)


def test_the_numbers_of_a_steady_server():
    report = run_virtual(run_plan(plan(slo=Slo(ttft_s=0.2, tpot_s=0.1)), FakeTarget(steady(0.1, 0.02))))
    (only,) = report.rounds
    m = only.metrics
    assert (m.sent, m.completed, m.errors, m.short) == (20, 20, {}, 0)
    for summary, expected in ((m.ttft_s, 0.1), (m.tpot_s, 0.02), (m.itl_s, 0.02)):
        assert summary is not None
        assert (summary.min, summary.p50, summary.max) == pytest.approx((expected,) * 3)
    assert m.goodput is not None
    assert m.goodput.share == 1.0
    assert m.arrivals.achieved_per_s == pytest.approx(m.arrivals.scheduled_per_s)
    assert m.throughput.output_tokens_per_s == pytest.approx(m.output_tokens / m.duration_s)
    assert report.over_rounds["ttft_p50_ms"].median == pytest.approx(100.0)
    assert report.settings["load"] == "open loop, 5 requests/s, Poisson"


def records(report: Report) -> list:
    return [r.records for r in report.rounds]


def test_the_same_seed_gives_the_same_run_and_rounds_differ():
    one, two = (run_virtual(run_plan(plan(rounds=3), FakeTarget(steady(0.1, 0.02)))) for _ in range(2))
    assert records(one) == records(two)
    assert len({r.records for r in one.rounds}) == 3
    again = run_virtual(run_plan(plan(seed=one.rounds[2].seed), FakeTarget(steady(0.1, 0.02))))
    due = [[(r.scheduled_s, r.asked_tokens) for r in report.rounds[i].records] for report, i in ((one, 2), (again, 0))]
    assert due[0] == due[1], "the recorded seed of a round repeats it alone"


def test_warm_up_is_sent_first_and_counted_nowhere():
    target = FakeTarget(steady(0.1, 0.02))
    phases = []
    report = run_virtual(
        run_plan(
            plan(warmup=5, rounds=2, input=parse_lengths("--input", "32")),
            target,
            on_phase=lambda name, total: phases.append((name, total)),
        )
    )
    assert len(target.started) == 2 * 25
    assert [r.metrics.sent for r in report.rounds] == [20, 20]
    assert phases == [("warm-up", 5), ("round 1 of 2", 20), ("warm-up", 5), ("round 2 of 2", 20)]
    assert len({r.prompt for r in target.started}) == 50, "a prompt of the warm-up must not come again"
    assert report.rounds[0].records[0].index == 0


def test_failures_of_the_warm_up_are_said():
    calls = []

    def first_three_fail(request) -> list[Step]:
        calls.append(request)
        return [Step(0.1, TargetError("UNAVAILABLE", "starting") if len(calls) <= 3 else Chunk(request.output_tokens))]

    report = run_virtual(run_plan(plan(warmup=5), FakeTarget(first_three_fail)))
    assert report.rounds[0].warmup_errors == {"UNAVAILABLE": 3}
    assert report.rounds[0].metrics.errors == {}
    assert "3 requests of the warm-up failed with UNAVAILABLE" in report.notes


@pytest.mark.parametrize(
    ("load", "extent", "sent"),
    [
        (ClosedLoop(3), Extent(10), 10),
        (ClosedLoop(2), Extent(None, 1.0), None),
        (ClosedLoop(2), Extent(4, 100.0), 4),
        (Burst(), Extent(9), 9),
        (Replay((0.0, 0.5, 0.5, 3.0)), Extent(4), 4),
        (OpenLoop(10.0, 3.0), Extent(None, 2.0), None),
    ],
)
def test_every_load_runs(load, extent, sent):
    report = run_virtual(run_plan(plan(load=load, extent=extent), FakeTarget(steady(0.1, 0.02))))
    m = report.rounds[0].metrics
    assert m.completed == m.sent > 1
    assert sent is None or m.sent == sent
    if isinstance(load, ClosedLoop):
        assert m.peak_in_flight == load.concurrency
        assert m.client_lag_s is None
    if extent.duration_s is not None:
        assert max(r.sent_s for r in report.rounds[0].records) < extent.duration_s


def test_a_plan_that_cannot_fit_is_refused_before_anything_is_sent():
    target = FakeTarget(steady(0.1, 0.02), max_context=7)
    with pytest.raises(ConfigError, match="context of 7 tokens"):
        run_virtual(run_plan(plan(), target))
    assert target.started == []


def test_random_prompts_need_a_vocabulary():
    with pytest.raises(ConfigError, match="--prompts must be given"):
        run_virtual(run_plan(plan(), FakeTarget(steady(0.1, 0.02), vocab_size=None)))


TRACE = Trace((1, 2), (3, 4), (0.0, 1.0))


def test_the_load_that_options_mean():
    assert choose_load(None, 1.0, None, None) == ClosedLoop(4)
    assert choose_load(None, 1.0, 7, TRACE) == ClosedLoop(7)
    assert choose_load(3.0, 2.0, None, TRACE) == OpenLoop(3.0, 2.0)
    assert choose_load(float("inf"), 1.0, None, None) == Burst()
    assert choose_load(None, 1.0, None, TRACE) == Replay((0.0, 1.0))
    assert choose_extent(None, None, ClosedLoop(4)) == Extent(64)
    assert choose_extent(None, None, Replay((0.0, 1.0))) == Extent(2)
    assert choose_extent(None, 5.0, OpenLoop(1.0)) == Extent(None, 5.0)


def test_the_lengths_that_options_mean():
    assert choose_lengths(None, None, None, False) == (parse_lengths("", "128"), parse_lengths("", "64"))
    assert choose_lengths("5", "6", None, False) == (parse_lengths("", "5"), parse_lengths("", "6"))
    assert choose_lengths(None, None, TRACE, False) == ((1, 2), (3, 4))
    assert choose_lengths(None, None, TRACE, True) == (None, (3, 4))
    assert choose_lengths(None, "7", None, True) == (None, parse_lengths("", "7"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choose_lengths("5", None, TRACE, False), "--input and --trace exclude each other, got '5'"),
        (lambda: choose_lengths("5", None, None, True), "--input and --prompts exclude each other, got '5'"),
        (lambda: choose_lengths(None, "5", TRACE, False), "--output and --trace exclude each other, got '5'"),
        (lambda: choose_load(3.0, 1.0, 4, None), "--rate and --concurrency exclude each other, got 3 and 4"),
        (lambda: choose_load(None, 2.0, None, None), "--cv needs --rate, got 2"),
        (lambda: choose_load(float("nan"), 1.0, None, None), "--rate .* got nan"),
        (lambda: choose_extent(None, 5.0, Burst()), "--rate inf needs --requests"),
        (lambda: choose_extent(3, None, Replay((0.0, 1.0))), "--requests must be at most 2, .* got 3"),
        (lambda: plan(rounds=0), "--rounds must be between 1 and 1000, got 0"),
        (lambda: plan(warmup=-1), "--warmup .* got -1"),
        (lambda: plan(seed=-1), "--seed .* got -1"),
        (lambda: plan(temperature=float("nan")), "--temperature must be between 0 and 2, got nan"),
        (lambda: plan(timeout_s=0.0), "--timeout .* got 0"),
        (lambda: plan(input=None), "--prompts must hold at least one line"),
    ],
)
def test_bad_plans_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
