"""Reports: JSON there and back, notes, comparisons, the table and the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.bench.virtual_time import run_virtual

from moestro.cluster.bench.arrivals import Extent, OpenLoop
from moestro.cluster.bench.compare import compare, differences
from moestro.cluster.bench.fake import FakeTarget, Step, steady
from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.metrics import compute_metrics
from moestro.cluster.bench.plan import Plan
from moestro.cluster.bench.plot import cdf, in_flight_over_time, save_plot, tokens_over_time
from moestro.cluster.bench.records import RequestRecord, ServerLedger
from moestro.cluster.bench.report import Report, find_notes, from_json, to_json
from moestro.cluster.bench.run import run_plan
from moestro.cluster.bench.slo import Slo
from moestro.cluster.bench.table import render_comparison, render_report
from moestro.cluster.bench.target import Chunk, TargetError
from moestro.protos.errors import ConfigError


def sometimes_failing(request) -> list[Step]:
    if request.index % 5 == 4:
        return [Step(0.1, TargetError("UNAVAILABLE", "lost [connection]"))]
    last = Chunk(1, "FINISH_REASON_LENGTH", 9, ServerLedger(1, 0.01, 0.02, 0.03, 1))
    return [Step(0.1, Chunk(2)), Step(0.05, last)]


def make(itl_s: float | None = None, rounds: int = 2, rate: float = 5.0) -> Report:
    lengths = parse_lengths("--output", "3")
    plan = Plan(OpenLoop(rate), Extent(10), lengths, lengths, rounds=rounds, slo=Slo(ttft_s=0.2))
    script = sometimes_failing if itl_s is None else steady(0.1, itl_s)
    return run_virtual(run_plan(plan, FakeTarget(script)))


def text_of(renderable) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("itl_s", [None, 0.02])
def test_json_there_and_back(itl_s):
    report = make(itl_s)
    assert from_json("--show", to_json(report)) == report


def test_json_is_strict_and_says_what_it_is():
    plain = json.loads(to_json(make()), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain["format"] == "moestro.bench.v1"
    assert plain["hardware"]["cores"]
    assert plain["rounds"][0]["metrics"]["errors"] == {"UNAVAILABLE": 2}
    assert len(plain["rounds"][0]["records"]) == 10


def test_records_are_left_out_on_demand():
    slim = from_json("--show", to_json(make(), with_records=False))
    assert [r.records for r in slim.rounds] == [None, None]
    assert slim.over_rounds == make().over_rounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--compare must name a report of moestro bench; the file: "),
        ("[]", "--compare must name a report"),
        ('{"settings": {}}', "; target: Field required"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json("--compare", text)


def test_a_report_of_another_format_is_refused():
    changed = to_json(make()).replace("moestro.bench.v1", "moestro.bench.v9")
    with pytest.raises(ConfigError, match=r"format: Input should be 'moestro.bench.v1'"):
        from_json("--show", changed)


def record(index: int, due: float, sent: float, **more) -> RequestRecord:
    values = {"asked_tokens": 1, "input_tokens": 5, "message_times_s": (sent + 0.1,), "message_tokens": (1,)} | more
    return RequestRecord(index=index, scheduled_s=due, sent_s=sent, done_s=sent + 0.1, **values)


GOOD = [record(i, i * 0.1, i * 0.1) for i in range(100)]


def test_a_sound_round_has_no_notes():
    assert find_notes(compute_metrics(GOOD, loop_delays_s=[0.001] * 50)) == []


@pytest.mark.parametrize(
    ("records", "delays", "note"),
    [
        (GOOD[:50], [], "p99 of 50 requests is little more than the slowest of them"),
        (
            [*GOOD, record(100, 10.0, 10.0, error="ABORTED", error_message="x")],
            [],
            "1 of 101 requests failed with ABORTED: x",
        ),
        ([*GOOD, record(100, 10.0, 10.0, asked_tokens=2)], [], "1 of 101 requests ended before the length asked for"),
        ([record(i, i * 0.1, i * 0.1 + 0.02) for i in range(100)], [], "the load generator sent late: 20.0 ms at p99"),
        ([record(i, i * 0.1, i * 0.2) for i in range(100)], [], "5 requests/s were sent, where 10 were due"),
        (GOOD, [0.0, 0.5], "the load generator was busy"),
        (
            [*GOOD, record(100, 10.0, 10.0, ledger=ServerLedger(3))],
            [],
            "3 of 505 input tokens came from a prefix cache",
        ),
    ],
)
def test_reasons_for_doubt_are_said(records, delays, note):
    notes = find_notes(compute_metrics(records, loop_delays_s=delays))
    assert any(note in text for text in notes), notes


def test_a_busy_client_is_said():
    notes = find_notes(compute_metrics(GOOD, client_cpu_s=9.5))
    assert notes == ["the load generator used 0.95 cores: it may be what limits the throughput"]


def test_an_early_end_is_no_reason_for_doubt_when_the_model_may_end():
    metrics = compute_metrics([*GOOD, record(100, 10.0, 10.0, asked_tokens=2)])
    assert metrics.short == 1
    assert find_notes(metrics, exact_lengths=False) == []


def test_comparison_of_medians_with_a_verdict_only_when_ranges_are_apart():
    base, slower = make(0.02), make(0.04)
    ratios = {r.number.key: r for r in compare(base, slower)}
    assert ratios["tpot_p50_ms"].ratio == pytest.approx(2.0)
    assert ratios["tpot_p50_ms"].verdict == "worse"
    assert ratios["output_tokens_per_s"].ratio < 1
    assert {r.number.key: r for r in compare(slower, base)}["tpot_p50_ms"].verdict == "better"
    assert all(r.ratio == 1.0 and r.verdict == "unclear" for r in compare(base, base) if r.ratio is not None)
    single = {r.number.key: r for r in compare(make(0.02, rounds=1), slower)}
    assert single["tpot_p50_ms"].verdict == "unclear", "one round shows no spread"


def test_differences_name_what_else_changed():
    assert differences(make(0.02), make(0.04)) == ()
    assert differences(make(), make(rate=6.0)) == (
        "load: open loop, 5 requests/s, Poisson -> open loop, 6 requests/s, Poisson",
    )


def test_the_table_shows_every_number_and_note():
    report = make()
    text = text_of(render_report(report))
    for part in (
        "scripted (fake)",
        "Time to first token",
        "Inter-token gap",
        "Output tokens (/s)",
        "Good share",
        "ttft=200ms",
    ):
        assert part in text
    assert f"{report.over_rounds['goodput_share'].median:.2f}" in text
    assert "8 of 10 completed" in text
    assert "2 of 10 requests failed with UNAVAILABLE: lost [connection]" in text
    assert "queued 10.00 ms" in text


def test_the_comparison_shows_ratio_and_differences():
    text = text_of(render_comparison(make(0.02), make(0.04, rate=6.0)))
    assert "2.000" in text
    assert "worse" in text
    assert "differs: load" in text


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_cdf_is_the_share_at_or_below(values):
    x, share = cdf(values)
    for value, part in zip(x, share, strict=True):
        below = sum(v <= value for v in values) / len(values)
        assert part <= below + 1e-12
    assert share[-1] == 1.0


def test_series_over_time_count_every_token_and_request():
    records = make().rounds[0].records
    for width_s in (0.05, 0.3):
        edges, rate = tokens_over_time(records, width_s)
        assert (rate * width_s).sum() == pytest.approx(sum(r.output_tokens for r in records))
        assert np.allclose(np.diff(edges), width_s)
    _, in_flight = in_flight_over_time(records)
    assert in_flight[-1] == 0
    assert in_flight.max() == make().rounds[0].metrics.peak_in_flight


def test_the_picture_is_a_picture(tmp_path):
    save_plot(make(), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    slim = from_json("--show", to_json(make(), with_records=False))
    with pytest.raises(ConfigError, match="--records keeps them"):
        save_plot(slim, tmp_path / "none.png")
    with pytest.raises(ConfigError, match="--plot cannot be written"):
        save_plot(make(), tmp_path / "run.nothing")
