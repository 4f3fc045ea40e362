"""Summaries of samples.

Quantiles interpolate linearly between order statistics: q of n sorted values is the value at position q * (n - 1)
counted from 0 (Hyndman and Fan 1996, type 7; numpy's default). With fewer than 100 values p99 is little more than the
largest, so every summary carries its count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Summary:
    """Count, mean, quantiles and extremes of a sample, in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    min: float
    max: float


def summarize(values: Sequence[float]) -> Summary | None:
    """The summary of ``values``; None when there are none, since nothing can be said then."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.quantile(array, (0.5, 0.9, 0.99), method="linear")
    return Summary(
        len(values), float(array.mean()), float(p50), float(p90), float(p99), float(array.min()), float(array.max())
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """One number over rounds."""

    median: float
    min: float
    max: float


def spread_over_rounds(rounds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Median and range of every number that all rounds have."""
    if not rounds:
        return {}
    shared = [name for name in rounds[0] if all(name in numbers for numbers in rounds)]
    columns = {name: [numbers[name] for numbers in rounds] for name in shared}
    return {name: Spread(statistics.median(column), min(column), max(column)) for name, column in columns.items()}
