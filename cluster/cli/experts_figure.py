"""Heat maps of experts as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moestro.cluster.client_results import GroupExperts
from moestro.protos.errors import ConfigError

COLOUR_MAX = 4.0  # times the layer's mean; more is drawn as bright


def save_figure(groups: Sequence[GroupExperts], path: Path) -> None:
    """One row per group: load relative to the layer's mean, and balancedness beside it. Raises ConfigError when
    matplotlib is not installed, no group has mixture layers, or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--png needs matplotlib: install moestro[bench]") from None
    mixed = [group for group in groups if group.report.layers]
    if not mixed:
        raise ConfigError("--png: the model has no mixture layers, nothing to draw")

    # A figure of its own, not pyplot: no global state, no display.
    tall = max(len(group.report.layers) for group in mixed)
    figure = Figure(figsize=(13, len(mixed) * min(12.0, 2.5 + 0.2 * tall)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(mixed), 2, squeeze=False, width_ratios=(5, 1))
    for (heat, balance), group in zip(rows, mixed, strict=True):
        report = group.report
        load_LE = np.array([layer.load for layer in report.layers], dtype=np.float64)
        mean_L1 = load_LE.mean(axis=1, keepdims=True)
        relative_LE = np.divide(load_LE, mean_L1, out=np.zeros_like(load_LE), where=mean_L1 > 0)
        image = heat.imshow(
            relative_LE, aspect="auto", interpolation="nearest", cmap="inferno", vmin=0, vmax=COLOUR_MAX
        )
        figure.colorbar(image, ax=heat, extend="max", label="load by the layer's mean")
        labels = [str(layer.layer) for layer in report.layers]
        heat.set(title=f"{group.name}: {report.architecture}, the last {report.window_s:.0f} s", xlabel="expert")
        heat.set(ylabel="layer", yticks=range(len(labels)), yticklabels=labels)
        balance.barh(range(len(labels)), [layer.balancedness for layer in report.layers], color="tab:gray")
        balance.set(title="balancedness", xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), yticks=[])
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--png cannot be written to {path}: {error.strerror or error}") from None
