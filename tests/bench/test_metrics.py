"""Summaries against the standard library; metrics against timelines worked out by hand."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.bench.metrics import compute_metrics
from moestro.cluster.bench.records import RequestRecord, ServerLedger
from moestro.cluster.bench.slo import Slo
from moestro.cluster.bench.summaries import Spread, spread_over_rounds, summarize


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=300))
def test_quantiles_agree_with_the_standard_library(values):
    summary = summarize(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert summary is not None
    scale = max(map(abs, values)) + 1
    for got, expected in ((summary.p50, cuts[49]), (summary.p90, cuts[89]), (summary.p99, cuts[98])):
        assert got == pytest.approx(expected, abs=1e-9 * scale)
    assert summary.mean == pytest.approx(statistics.fmean(values), abs=1e-9 * scale)
    assert (summary.count, summary.min, summary.max) == (len(values), min(values), max(values))


def test_quantiles_interpolate_between_neighbours():
    summary = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert summary is not None
    assert (summary.p50, summary.p90, summary.p99) == pytest.approx((3.0, 4.6, 4.96))  # positions 2, 3.6 and 3.96


def test_nothing_has_no_summary():
    assert summarize([]) is None


def record(index: int, scheduled: float, sent: float, times: tuple[float, ...], tokens: tuple[int, ...], **more):
    done = times[-1] if times else sent
    values = {"done_s": done, "asked_tokens": sum(tokens), "input_tokens": 10} | more
    return RequestRecord(
        index=index, scheduled_s=scheduled, sent_s=sent, message_times_s=times, message_tokens=tokens, **values
    )


# Due at 1.0 and sent 0.5 late; tokens at 2.0, 2.25, then two at once at 3.0; the stream ends at 3.5.
LATE = record(0, 1.0, 1.5, (2.0, 2.25, 3.0), (1, 1, 2), done_s=3.5)
SINGLE = record(1, 2.0, 2.0, (2.5,), (1,), asked_tokens=3)
FAILED = record(2, 3.0, 3.0, (3.25,), (2,), done_s=4.0, error="UNAVAILABLE", error_message="gone")


def test_latencies_count_from_the_time_a_request_was_due():
    assert LATE.client_lag_s == 0.5
    assert LATE.ttft_s == 1.0
    assert LATE.tpot_s == pytest.approx(1.0 / 3)  # (3.0 - 2.0) over three tokens after the first
    assert LATE.itl_s() == [0.25, 0.75, 0.0]  # the last two came together
    assert LATE.e2e_s == 2.5


def test_a_single_token_has_no_tpot_and_no_gap():
    assert SINGLE.tpot_s is None
    assert SINGLE.itl_s() == []


def test_tokens_that_come_with_the_first_have_no_gap():
    assert record(0, 0.0, 0.0, (1.0, 2.0), (3, 2)).itl_s() == [0.0, 0.0, 1.0, 0.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 1), st.integers(1, 5)), min_size=1, max_size=30))
def test_gaps_are_one_a_token_and_add_up(messages):
    times, now = [], 0.0
    for gap, _ in messages:
        now += gap
        times.append(now)
    r = record(0, 0.0, 0.0, tuple(times), tuple(n for _, n in messages))
    gaps = r.itl_s()
    assert len(gaps) == r.output_tokens - 1
    assert sum(gaps) == pytest.approx(times[-1] - times[0])
    assert r.tpot_s == (pytest.approx(statistics.fmean(gaps)) if gaps else None)


def test_metrics_of_a_round_by_hand():
    m = compute_metrics([LATE, SINGLE, FAILED], slo=Slo(ttft_s=0.75), asked_per_s=2.0)
    assert m.duration_s == 4.0  # until the failed one ended
    assert (m.sent, m.completed, m.short) == (3, 2, 1)
    assert m.errors == {"UNAVAILABLE": 1}
    assert m.error_examples == {"UNAVAILABLE": "gone"}
    assert (m.input_tokens, m.output_tokens, m.discarded_tokens) == (20, 5, 2)
    assert m.tokens_per_message == 5 / 4
    t = m.throughput
    assert (t.requests_per_s, t.input_tokens_per_s, t.output_tokens_per_s, t.total_tokens_per_s) == (0.5, 5, 1.25, 6.25)
    assert m.goodput is not None
    assert (m.goodput.met, m.goodput.share, m.goodput.requests_per_s) == (1, pytest.approx(1 / 3), 0.25)
    assert m.ttft_s is not None
    assert (m.ttft_s.count, m.ttft_s.mean, m.ttft_s.p50, m.ttft_s.max) == (2, 0.75, 0.75, 1.0)
    assert m.tpot_s is not None
    assert m.tpot_s.count == 1
    assert m.itl_s is not None
    assert (m.itl_s.count, m.itl_s.p50, m.itl_s.max) == (3, 0.25, 0.75)
    assert m.e2e_s is not None
    assert (m.e2e_s.min, m.e2e_s.max) == (0.5, 2.5)
    assert m.arrivals.asked_per_s == 2.0
    assert m.arrivals.scheduled_per_s == 1.0  # 1.0, 2.0, 3.0
    assert m.arrivals.achieved_per_s == pytest.approx(2 / 1.5)  # 1.5, 2.0, 3.0
    assert m.client_lag_s is not None
    assert (m.client_lag_s.p50, m.client_lag_s.max) == (0.0, 0.5)
    assert m.peak_in_flight == 2  # from 2.0 to 2.5, and again from 3.0
    assert m.mean_in_flight == pytest.approx((2.0 + 0.5 + 1.0) / 4.0)


def test_one_that_ends_as_another_starts_is_not_in_flight_with_it():
    assert compute_metrics([record(i, i, i, (i + 1.0,), (1,)) for i in range(3)]).peak_in_flight == 1


def test_goodput_needs_every_bound():
    slo = Slo(ttft_s=1.0, tpot_s=0.3)
    good = compute_metrics([LATE], slo=slo).goodput
    assert good is not None
    assert good.met == 0  # TTFT is 1.0, TPOT a third
    assert compute_metrics([LATE], slo=Slo(1.0, 0.34, 2.5)).goodput.met == 1
    assert compute_metrics([LATE]).goodput is None


def test_a_closed_loop_has_no_lag_and_no_asked_rate():
    m = compute_metrics([SINGLE], scheduled_load=False)
    assert m.client_lag_s is None
    assert (m.arrivals.asked_per_s, m.arrivals.scheduled_per_s) == (None, None)


def test_a_round_where_everything_failed():
    m = compute_metrics([FAILED], slo=Slo(ttft_s=1.0))
    assert (m.completed, m.ttft_s, m.tpot_s, m.itl_s, m.e2e_s, m.server) == (0, None, None, None, None, None)
    assert m.goodput is not None
    assert m.goodput.share == 0.0
    assert m.throughput.output_tokens_per_s == 0.0


def test_server_ledgers_are_summed_up():
    ledgers = [ServerLedger(3, 0.1, 0.2, 0.3, 1), ServerLedger(4, 0.3, 0.4, 0.5, 0)]
    done = [record(i, 0, 0, (1.0,), (1,), ledger=ledger) for i, ledger in enumerate(ledgers)]
    server = compute_metrics([*done, SINGLE]).server
    assert server is not None
    assert (server.queued_s.mean, server.prefill_s.count) == (pytest.approx(0.2), 2)
    assert (server.cached_tokens, server.preemptions) == (7, 1)


def test_spread_over_rounds_keeps_what_all_rounds_have():
    rounds = [{"a": 3.0, "b": 1.0}, {"a": 1.0}, {"a": 10.0, "b": 2.0}]
    assert spread_over_rounds(rounds) == {"a": Spread(3.0, 1.0, 10.0)}
    assert spread_over_rounds([]) == {}
