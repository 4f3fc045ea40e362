"""The result of a benchmark as it is saved: settings, target, hardware, and the metrics of every round.

The JSON is the dataclasses below, field by field; ``format`` changes when a field changes its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from moestro.cluster.bench.headline import read_numbers
from moestro.cluster.bench.metrics import Metrics
from moestro.cluster.bench.plan import Setting
from moestro.cluster.bench.records import RequestRecord
from moestro.cluster.bench.summaries import Spread, spread_over_rounds
from moestro.cluster.bench.target import TargetInfo
from moestro.protos.errors import ConfigError

_LATE_S = 0.01
_OFF_BY = 0.05
_BUSY_CORES = 0.8  # one Python process hardly uses more than one


@dataclass(frozen=True, slots=True)
class Round:
    """One round. ``seed`` given as ``--seed`` repeats it alone."""

    index: int
    seed: int
    metrics: Metrics
    warmup_errors: Mapping[str, int]
    records: tuple[RequestRecord, ...] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A whole benchmark. ``over_rounds`` holds median, least and greatest of each number of ``headline.NUMBERS``;
    ``notes`` what a reader must know before trusting them."""

    settings: Mapping[str, Setting]
    target: TargetInfo
    hardware: Mapping[str, object]  # of the load generator; the server's when it is the same machine
    rounds: tuple[Round, ...]
    over_rounds: Mapping[str, Spread]
    notes: tuple[str, ...]
    format: Literal["moestro.bench.v1"] = "moestro.bench.v1"


_ADAPTER = TypeAdapter(Report)


def make_report(
    settings: Mapping[str, Setting], target: TargetInfo, hardware: Mapping[str, object], rounds: Sequence[Round]
) -> Report:
    """The report of ``rounds``, with what follows from them."""
    numbers = spread_over_rounds([read_numbers(r.metrics) for r in rounds])
    exact = settings.get("ignore_eos") is not False
    notes = [_prefix(r, len(rounds), note) for r in rounds for note in _warmup_notes(r) + find_notes(r.metrics, exact)]
    return Report(settings, target, hardware, tuple(rounds), numbers, tuple(notes))


def to_json(report: Report, *, with_records: bool = True) -> str:
    """The report as JSON; ``with_records`` keeps each request's timeline when the report has them."""
    exclude = None if with_records else {"rounds": {"__all__": {"records"}}}
    return _ADAPTER.dump_json(report, indent=2, exclude=exclude).decode() + "\n"


def from_json(option: str, text: str) -> Report:
    """The report that ``to_json`` wrote. Raises ConfigError naming the first field that does not fit."""
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{option} must name a report of moestro bench; {where}: {first['msg']}") from None


def find_notes(metrics: Metrics, exact_lengths: bool = True) -> list[str]:
    """Reasons to doubt a round's numbers, in plain words; empty when there is none. ``exact_lengths``: an answer
    shorter than asked for is one of them (not so when the model may end it)."""
    notes = [
        f"{count} of {metrics.sent} requests failed with {code}: {metrics.error_examples.get(code, '')}"
        for code, count in metrics.errors.items()
    ]
    if metrics.short and exact_lengths:
        notes.append(f"{metrics.short} of {metrics.completed} requests ended before the length asked for")
    if 0 < metrics.completed < 100:
        notes.append(f"p99 of {metrics.completed} requests is little more than the slowest of them")
    lag, delay = metrics.client_lag_s, metrics.loop_delay_s
    if lag is not None and lag.p99 > _LATE_S:
        notes.append(f"the load generator sent late: {lag.p99 * 1e3:.1f} ms at p99 (counted in every latency)")
    if delay is not None and delay.p99 > _LATE_S:
        notes.append(f"the load generator was busy: its event loop woke {delay.p99 * 1e3:.1f} ms late at p99")
    if metrics.client_cores is not None and metrics.client_cores > _BUSY_CORES:
        notes.append(f"the load generator used {metrics.client_cores:.2f} cores: it may be what limits the throughput")
    due, sent = metrics.arrivals.scheduled_per_s, metrics.arrivals.achieved_per_s
    if due is not None and sent is not None and abs(sent / due - 1) > _OFF_BY:
        notes.append(f"{sent:.4g} requests/s were sent, where {due:.4g} were due")
    if metrics.server is not None and metrics.server.cached_tokens:
        notes.append(f"{metrics.server.cached_tokens} of {metrics.input_tokens} input tokens came from a prefix cache")
    return notes


def _warmup_notes(round_: Round) -> list[str]:
    return [f"{count} requests of the warm-up failed with {code}" for code, count in round_.warmup_errors.items()]


def _prefix(round_: Round, count: int, note: str) -> str:
    return note if count == 1 else f"round {round_.index}: {note}"
