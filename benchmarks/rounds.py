"""What several rounds say: median and range of each figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median and range of each figure over rounds. Ratios belong in the rows: they are taken round by round, so that a
    machine that slows down between rounds does not distort them."""
    return {
        key: {
            "median": statistics.median(row[key] for row in rows),
            "min": min(row[key] for row in rows),
            "max": max(row[key] for row in rows),
        }
        for key in rows[0]
    }
