"""The record as a picture: a panel a checkpoint and figure, bars of each engine by batch size, the roof as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIGURES = ("decode", "prefill")


def save_plot(record: Mapping[str, Any], path: Path) -> None:
    """Medians as bars, ranges of the rounds as whiskers."""
    models = record["models"]
    figure = Figure(figsize=(12, 4 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(FIGURES), squeeze=False)
    for row, (checkpoint, model) in zip(panels, models.items(), strict=True):
        for axes, name in zip(row, FIGURES, strict=True):
            _draw(axes, [cell for cell in model["cells"] if cell["figure"] == name], list(model["engines"]))
            axes.set(title=f"{checkpoint}: {name}", xlabel="batch", ylabel="tokens/s", yscale="log")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw(axes: Any, cells: list[Mapping[str, Any]], engines: list[str]) -> None:
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        found = [(at, cell["engines"][engine]) for at, cell in enumerate(cells) if engine in cell["engines"]]
        heights = [each["median"] for _, each in found]
        below = [each["median"] - each["min"] for _, each in found]
        above = [each["max"] - each["median"] for _, each in found]
        places = [at + (index - (len(engines) - 1) / 2) * width for at, _ in found]
        axes.bar(places, heights, width, yerr=[below, above], capsize=2, label=engine)
    roofs = [cell["roof_tokens_per_s"] for cell in cells]
    axes.plot(range(len(cells)), roofs, "k_--", markersize=20, linewidth=0.6, label="roof")
    axes.set_xticks(range(len(cells)), [str(cell["batch"]) for cell in cells])
