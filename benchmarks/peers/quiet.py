"""Other work on the machine: waiting until there is little, and doing again what it disturbed.

A turn is judged by what others did meanwhile, never by its own time, so that no engine is favoured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from benchmarks.peers.process import Turn


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a quiet moment, which is when others use at most ``most_cores``, and how often to do a turn
    again that was not quiet."""

    most_cores: float = 0.2
    wait_s: float = 0.0
    repeats: int = 0


def await_quiet(patience: Patience) -> None:
    """Returns in a quiet moment, or after ``wait_s``. Needs all workers to be stopped."""
    deadline = time.monotonic() + patience.wait_s
    while time.monotonic() < deadline:
        if psutil.cpu_percent(interval=0.2) / 100 * (psutil.cpu_count() or 1) <= patience.most_cores:
            return


def quietest(turn: Callable[[], Turn], patience: Patience, wait: Callable[[Patience], None] = await_quiet) -> Turn:
    """The first quiet turn, or of all that were tried the one that others disturbed least."""
    wait(patience)
    best = turn()
    for _ in range(patience.repeats):
        if best.others_cores <= patience.most_cores:
            break
        wait(patience)
        best = min(best, turn(), key=lambda each: each.others_cores)
    return best
