"""A run as a picture: tokens/s, stalled streams and serving ranks over time, with every fault marked."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.run import Result
from benchmarks.chaos.strikes import STALLED_S, stalled, tokens_per_s

BIN_S = 0.5
COLOURS = ("#c0392b", "#2471a3", "#b9770e", "#1e8449", "#7d3c98", "#117a65", "#5d6d7e", "#a04000", "#2c3e50", "#d35400")


def save_plot(result: Result, path: Path, title: str) -> None:
    """Writes the picture in the format of the file's suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edges = [index * BIN_S for index in range(int(result.seconds / BIN_S) + 2)]
    figure = Figure(figsize=(max(13.0, min(40.0, result.seconds / 12)), 8), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, stalls, ranks = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.2))
    tokens.stairs(tokens_per_s(result.records, edges), edges, fill=True, color="#aab7b8")
    tokens.set(ylabel="tokens/s", ylim=(0, None), title=title)
    stalls.step(edges, stalled(result.records, edges), where="post", color="#2c3e50")
    stalls.set(ylabel=f"streams silent for {STALLED_S:g} s", ylim=(0, None))
    known = [each for each in result.history if each.answered]
    ranks.step([each.at_s for each in known], [each.serving for each in known], where="post", color="#2c3e50")
    ranks.set(ylabel="ranks that serve", ylim=(0, None), xlabel="s", xlim=(0, edges[-1]))
    kinds = list(dict.fromkeys(strike.kind for strike in result.strikes))
    labelled: set[str] = set()
    for strike in result.strikes:
        colour = COLOURS[kinds.index(strike.kind) % len(COLOURS)]
        for axes in (tokens, stalls, ranks):
            axes.axvline(strike.at_s, color=colour, linewidth=1.2)
            if strike.undone_s > strike.at_s:
                axes.axvspan(strike.at_s, strike.undone_s, color=colour, alpha=0.12, linewidth=0)
        tokens.plot([], [], color=colour, label=None if strike.kind in labelled else strike.kind)
        labelled.add(strike.kind)
        for at_s, marker in ((strike.detected_s, "v"), (strike.whole_s, "^")):
            if at_s is not None:
                ranks.plot([at_s], [0.15], marker=marker, color=colour, markersize=5)
    ranks.plot([], [], "v", color="#5d6d7e", label="told by the status")
    ranks.plot([], [], "^", color="#5d6d7e", label="all ranks serve")
    for axes in (tokens, ranks):
        axes.legend(loc="upper right", ncols=4, fontsize="small")
    for axes in (tokens, stalls, ranks):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
