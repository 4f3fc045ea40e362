"""Loads as rows of shaded cells, for terminals with and without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

MAX_CELL = 4  # columns of one expert where there is room

# Of a cell's load relative to the layer's mean: below this bound, this glyph, this colour.
_LEVELS = (
    (0.5, "░", "blue"),
    (1.5, "▒", "cyan"),
    (3.0, "▓", "yellow"),
    (float("inf"), "█", "red"),
)
_NONE = ("·", "bright_black")


def bin_loads(load: Sequence[int], num_bins: int) -> tuple[float, ...]:
    """Loads relative to their mean, in at most ``num_bins`` (at least 1) runs of neighbouring experts, as even as whole
    experts allow. A run has the load of its busiest expert: in an average the one that matters would vanish."""
    total, count = sum(load), len(load)
    if not total:
        return (0.0,) * min(count, num_bins)
    bins = min(count, num_bins)
    bounds = [count * number // bins for number in range(bins + 1)]
    return tuple(max(load[bounds[i] : bounds[i + 1]]) * count / total for i in range(bins))


def shade(relative: float) -> tuple[str, str]:
    """The glyph and the colour of a load relative to the mean."""
    if relative == 0:
        return _NONE
    return next((glyph, colour) for below, glyph, colour in _LEVELS if relative < below)


def heat_row(load: Sequence[int], width: int) -> Text:
    """One layer's experts in at most ``width`` columns; few experts get several columns each."""
    cells = bin_loads(load, width)
    cell = max(1, min(MAX_CELL, width // max(1, len(cells))))
    row = Text(no_wrap=True, end="")
    for relative in cells:
        glyph, colour = shade(relative)
        row.append(glyph * cell, colour)
    return row


def legend(num_experts: int, width: int) -> Text:
    """What columns and shades stand for."""
    text = Text("load by the layer's mean:  ", "dim", end="")
    text.append(_NONE[0], _NONE[1]).append(" none")
    low = 0.0
    for below, glyph, colour in _LEVELS:
        text.append("  ").append(glyph, colour)
        text.append(f" {low:g} to {below:g}" if below != float("inf") else f" {low:g} and more")
        low = below
    if num_experts > width:
        text.append(f"   (a column is the busiest of up to {-(-num_experts // width)} experts)")
    return text
