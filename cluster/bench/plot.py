"""A report as a picture: the distribution of each latency, and throughput and load over time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.bench.records import RequestRecord
from moestro.cluster.bench.report import Report
from moestro.protos.errors import ConfigError

Array = NDArray[np.float64]


def cdf(values: Sequence[float]) -> tuple[Array, Array]:
    """The empirical distribution: sorted values and the share of the sample at or below each."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    return x, np.arange(1, len(x) + 1, dtype=np.float64) / max(1, len(x))


def tokens_over_time(records: Sequence[RequestRecord], width_s: float) -> tuple[Array, Array]:
    """Left edges of windows of ``width_s`` seconds from the start of the round, and output tokens/s in each."""
    times = [time for r in records for time in r.message_times_s]
    weights = [tokens for r in records for tokens in r.message_tokens]
    edges: Array = np.arange(int(max(times, default=0.0) / width_s) + 2, dtype=np.float64) * width_s
    tokens, _ = np.histogram(times, bins=edges, weights=weights)
    return edges[:-1], tokens / width_s


def in_flight_over_time(records: Sequence[RequestRecord]) -> tuple[Array, Array]:
    """Times at which a request was sent or ended, and how many were in flight from then on."""
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.done_s, -1) for r in records])
    times = np.array([time for time, _ in changes], dtype=np.float64)
    return times, np.cumsum(np.array([change for _, change in changes], dtype=np.float64))


def save_plot(report: Report, path: Path) -> None:
    """Writes the picture in the format of the file's suffix. Raises ConfigError when matplotlib is not installed or
    the report was saved without its requests."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: install moestro[bench]") from None
    if not any(r.records for r in report.rounds):
        raise ConfigError("--plot needs the requests of a report, got one saved without them (--records keeps them)")

    # A figure of its own, not pyplot: no global state, no display.
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for r in report.rounds:
        _draw_round(axes, r.records or (), f"round {r.index}")
    titles = ("Time to first token", "Time per output token", "Inter-token gap", "End to end")
    for ax, title in zip(axes.flat[:4], titles, strict=True):
        ax.set(title=title, xlabel="ms", ylabel="share at or below", ylim=(0, 1))
    axes.flat[4].set(title="Output tokens/s", xlabel="s since the start of the round", ylim=(0, None))
    axes.flat[5].set(title="Requests in flight", xlabel="s since the start of the round", ylim=(0, None))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    if len(report.rounds) > 1:
        axes.flat[0].legend(loc="lower right")
    figure.suptitle(f"{report.target.model}: {report.settings['load']}, rounds {len(report.rounds)}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot cannot be written to {path}: {error}") from None


def _draw_round(axes: Any, records: Sequence[RequestRecord], label: str) -> None:
    done = [r for r in records if r.error is None]
    samples = (
        [r.ttft_s for r in done],
        [tpot for r in done if (tpot := r.tpot_s) is not None],
        [gap for r in done for gap in r.itl_s()],
        [r.e2e_s for r in done],
    )
    for ax, values in zip(axes.flat[:4], samples, strict=True):
        x, share = cdf(values)
        ax.step(x * 1e3, share, where="post", label=label)
    span_s = max((r.done_s for r in records), default=0.0)
    axes.flat[4].step(*tokens_over_time(records, max(span_s / 60, 0.05)), where="post", label=label)
    axes.flat[5].step(*in_flight_over_time(records), where="post", label=label)
