"""The numbers a report is read by: one list for the table, for medians over rounds and for comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moestro.cluster.bench.metrics import Metrics
from moestro.cluster.bench.summaries import Summary

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Number:
    """``read`` returns None when a round has no such number."""

    key: str
    label: str
    unit: str
    better: Better
    read: Callable[[Metrics], float | None]


LATENCIES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl", "Inter-token gap"),
    ("e2e", "End to end"),
)
STATISTICS = ("mean", "p50", "p90", "p99")


def _latency(name: str, label: str, statistic: str) -> Number:
    def read(metrics: Metrics) -> float | None:
        summary: Summary | None = getattr(metrics, f"{name}_s")
        return None if summary is None else float(getattr(summary, statistic)) * 1e3

    return Number(f"{name}_{statistic}_ms", f"{label} {statistic}", "ms", "lower", read)


THROUGHPUT = (
    Number("requests_per_s", "Requests", "/s", "higher", lambda m: m.throughput.requests_per_s),
    Number("input_tokens_per_s", "Input tokens", "/s", "higher", lambda m: m.throughput.input_tokens_per_s),
    Number("output_tokens_per_s", "Output tokens", "/s", "higher", lambda m: m.throughput.output_tokens_per_s),
    Number("total_tokens_per_s", "All tokens", "/s", "higher", lambda m: m.throughput.total_tokens_per_s),
    Number("goodput_per_s", "Good requests", "/s", "higher", lambda m: m.goodput.requests_per_s if m.goodput else None),
    Number("goodput_share", "Good share", "%", "higher", lambda m: 100 * m.goodput.share if m.goodput else None),
)
LATENCY = tuple(_latency(name, label, statistic) for name, label in LATENCIES for statistic in STATISTICS)
NUMBERS = THROUGHPUT + LATENCY


def read_numbers(metrics: Metrics) -> dict[str, float]:
    """Every number that the round has, by key."""
    found = {number.key: number.read(metrics) for number in NUMBERS}
    return {key: float(value) for key, value in found.items() if value is not None}
