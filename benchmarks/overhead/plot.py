"""The growth curves as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(growth: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per size that is varied; both axes logarithmic, so that linear growth is a slope of 1 (dotted)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(curve["of"] for curve in growth))
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves = [curve for curve in growth if curve["of"] == panel]
        for curve in curves:
            sizes = [int(size) for size in curve["us"]]
            costs = [cost["median"] for cost in curve["us"].values()]
            axes.plot(sizes, costs, marker="o", label=f"{curve['title']} ({curve['slope']:.2f})")
            axes.plot([sizes[0], sizes[-1]], [costs[0], costs[0] * sizes[-1] / sizes[0]], "k:", linewidth=0.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        lowest = min(cost["median"] for curve in curves for cost in curve["us"].values())
        highest = max(cost["median"] for curve in curves for cost in curve["us"].values())
        axes.set(xlabel=panel, ylabel="µs of CPU", ylim=(lowest / 3, max(highest, 10 * lowest) * 4))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize="small", title="slope of the last three points", title_fontsize="small")
    figure.suptitle("Host time of the engine; dotted: linear growth from the first point")
    figure.savefig(path, dpi=120)
