"""A report, and a comparison of two, as tables for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moestro.cluster.bench.compare import compare, differences
from moestro.cluster.bench.headline import LATENCIES, STATISTICS, THROUGHPUT
from moestro.cluster.bench.report import Report
from moestro.cluster.bench.summaries import Spread

_VERDICT_STYLE = {"better": "green", "worse": "red", "unclear": "dim"}


def render_report(report: Report) -> RenderableType:
    """What was run, the numbers (median over rounds, with the range when there is more than one), and the notes."""
    return Group(
        _heading(report), _latency_table(report), _throughput_table(report), _client_lines(report), _notes(report)
    )


def render_comparison(base: Report, new: Report) -> RenderableType:
    """Every shared number with its ratio, and what else differs."""
    table = _table("Compared with the base")
    for column in ("base", "new", "new / base", "verdict"):
        table.add_column(column, justify="right")
    for row in compare(base, new):
        table.add_row(
            f"{row.number.label} ({row.number.unit})",
            _cell(row.base),
            _cell(row.new),
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            Text(row.verdict, style=_VERDICT_STYLE[row.verdict]),
        )
    lines = [Text(f"differs: {line}", style="yellow") for line in differences(base, new)]
    return Group(table, *lines)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    return table


def _heading(report: Report) -> RenderableType:
    settings, target = report.settings, report.target
    server = " ".join(part for part in (target.kind, target.version) if part)
    extent = [
        f"{settings[key]:g} {unit}" for key, unit in (("requests", "requests"), ("duration_s", "s")) if settings[key]
    ]
    lines = (
        f"[bold]{escape(target.model)}[/bold] ({escape(server)})",
        f"{settings['load']}; {' or '.join(extent)}; warm-up {settings['warmup']}; rounds {settings['rounds']}",
        f"input {settings['input']} tokens, output {settings['output']} tokens, seed {settings['seed']}",
    )
    return Text.from_markup("\n".join((*lines, "")))


def _latency_table(report: Report) -> Table:
    table = _table("Latency (ms)")
    for statistic in STATISTICS:
        table.add_column(statistic, justify="right")
    for name, label in LATENCIES:
        table.add_row(label, *(_cell(report.over_rounds.get(f"{name}_{statistic}_ms")) for statistic in STATISTICS))
    return table


def _throughput_table(report: Report) -> Table:
    table = _table("\nThroughput")
    table.add_column("", justify="right")
    for number in THROUGHPUT:
        spread = report.over_rounds.get(number.key)
        if spread is not None:
            table.add_row(f"{number.label} ({number.unit})", _cell(spread))
    if report.settings.get("slo"):
        table.caption = f"good: {report.settings['slo']}"
        table.caption_justify = "left"
    return table


def _client_lines(report: Report) -> RenderableType:
    lines = []
    for r in report.rounds:
        m = r.metrics
        parts = [f"{m.completed} of {m.sent} completed in {m.duration_s:.2f} s"]
        parts.append(f"in flight {m.mean_in_flight:.1f} on average, {m.peak_in_flight} at most")
        rates = (
            ("asked", m.arrivals.asked_per_s),
            ("drawn", m.arrivals.scheduled_per_s),
            ("sent", m.arrivals.achieved_per_s),
        )
        known = [f"{name} {value:.3g}" for name, value in rates if value is not None]
        if m.client_lag_s is not None and known:
            parts.append(f"arrivals/s {', '.join(known)}")
        if m.client_lag_s is not None:
            parts.append(
                f"sent late by {m.client_lag_s.p50 * 1e3:.2f} ms at p50, {m.client_lag_s.p99 * 1e3:.2f} at p99"
            )
        if m.tokens_per_message is not None:
            parts.append(f"{m.tokens_per_message:.2f} tokens a message")
        if m.client_cores is not None:
            parts.append(f"client used {m.client_cores:.2f} cores")
        if m.server is not None:
            queued, prefill = m.server.queued_s.p50 * 1e3, m.server.prefill_s.p50 * 1e3
            parts.append(f"server's own p50: queued {queued:.2f} ms, prefill {prefill:.2f} ms")
        lines.append(f"round {r.index} (seed {r.seed}): " + "; ".join(parts))
    return Text("\n" + "\n".join(lines), style="dim")


def _notes(report: Report) -> RenderableType:
    return Text("\n".join(f"note: {note}" for note in report.notes), style="yellow")


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.min == spread.max:
        return _number(spread.median)
    return f"{_number(spread.median)} [{_number(spread.min)}, {_number(spread.max)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
