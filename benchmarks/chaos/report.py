"""What came of a run: figures, a verdict, JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.chaos.records import Verdict, verdicts
from benchmarks.chaos.run import Result
from benchmarks.chaos.strikes import Strike
from rich.table import Table

NUM_SHOWN = 20  # of the answers that were wrong, in the JSON


def is_good(result: Result) -> bool:
    """Nothing was lost, every answer was what it would have been, and nothing is left over."""
    return (
        bool(result.records)
        and all(record.verdict is Verdict.EQUAL for record in result.records)
        and result.is_empty
        and result.is_whole
    )


def figures(result: Result) -> dict[str, Any]:
    """The run in numbers, ready for JSON."""
    done = result.strikes
    tokens = sum(sum(record.tokens) for record in result.records)
    return {
        "seconds": result.seconds,
        "good": is_good(result),
        "requests": len(result.records),
        "verdicts": verdicts(result.records),
        "how": dict(Counter(record.how for record in result.records)),
        "tokens": tokens,
        "tokens_per_s": tokens / result.seconds,
        "migrated_requests": sum(record.migrations > 0 for record in result.records),
        "migrations": sum(record.migrations for record in result.records),
        "empty_afterwards": result.is_empty,
        "whole_afterwards": result.is_whole,
        "faults": len(done),
        "skipped": list(result.skipped),
        "by_kind": {kind: _of_kind([each for each in done if each.kind == kind]) for kind in _kinds(done)},
        "wrong": [r.detail for r in result.records if r.verdict is not Verdict.EQUAL][:NUM_SHOWN],
        "strikes": [asdict(strike) for strike in result.strikes],
    }


def _kinds(strikes: Sequence[Strike]) -> list[str]:
    return list(dict.fromkeys(strike.kind for strike in strikes))


def _of_kind(strikes: Sequence[Strike]) -> dict[str, Any]:
    def spread(seconds: Callable[[Strike], float | None]) -> dict[str, float | int]:
        known = sorted(value for strike in strikes if (value := seconds(strike)) is not None)
        if not known:
            return {"count": 0}
        return {"count": len(known), "median": statistics.median(known), "max": known[-1]}

    return {
        "count": len(strikes),
        "detected_after_s": spread(lambda s: None if s.detected_s is None else s.detected_s - s.at_s),
        "whole_after_s": spread(lambda s: None if s.whole_s is None else s.whole_s - s.at_s),
        "straggler_named_after_s": spread(lambda s: None if s.named_s is None else s.named_s - s.at_s),
        "stall_of_streams_that_stayed": quantiles([each for strike in strikes for each in strike.stayed_s]),
        "stall_of_streams_that_moved": quantiles([each for strike in strikes for each in strike.moved_s]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """Count, median, 99th percentile and maximum; the count alone when there are none."""
    if not seconds:
        return {"count": 0}
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"count": len(ordered), "median": statistics.median(ordered), "p99": p99, "max": ordered[-1]}


def table(told: dict[str, Any]) -> Table:
    """For people."""
    counts = told["verdicts"]
    title = (
        f"{told['faults']} faults in {told['seconds']:.0f} s, {told['requests']} requests: {counts['equal']} equal, "
        f"{counts['different']} different, {counts['lost']} lost; {told['migrated_requests']} migrated"
    )
    shown = Table(title=title, title_justify="left")
    for name in ("fault", "count", "told after", "whole after", "stall, stayed", "stall, moved"):
        shown.add_column(name, justify="left" if name == "fault" else "right")
    for kind, row in told["by_kind"].items():
        times = [_cell(row[name], "max") for name in ("detected_after_s", "whole_after_s")]
        stalls = [_cell(row[f"stall_of_streams_that_{name}"], "p99") for name in ("stayed", "moved")]
        shown.add_row(kind, str(row["count"]), *times, *stalls)
    return shown


def _cell(spread: dict[str, float], high: str) -> str:
    return f"{spread['median']:.2f}, {high} {spread[high]:.2f} s" if spread["count"] else ""
