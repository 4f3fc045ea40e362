"""Who may have killed an engine. One asyncio loop.

A request that was running when an engine died, and has got no further since (``journal.PROGRESS``), is a suspect:
answers are deterministic, so one that kills would kill at the same position again, and one that got further is
innocent. Its next run is a trial. A death in a trial that no other suspect shared proves it; one that others shared
makes each of them run alone next, so that a poisonous request takes nobody with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Trial:
    """A suspect's run, until it gets further. ``was_alone``: no other trial at any time of it."""

    exclusive: bool
    was_alone: bool


class Suspects:
    """The trials at one edge."""

    def __init__(self) -> None:
        self._trials: dict[Trial, None] = {}
        self._ended = asyncio.Event()

    async def begin(self, num_deaths: int) -> Trial:
        """Waits for its turn: a suspect of two deaths or more runs alone."""
        exclusive = num_deaths >= 2
        while any(trial.exclusive for trial in self._trials) or (exclusive and self._trials):
            self._ended.clear()
            await self._ended.wait()
        for other in self._trials:
            other.was_alone = False
        trial = Trial(exclusive, was_alone=not self._trials)
        self._trials[trial] = None
        return trial

    def end(self, trial: Trial) -> None:
        """It got further, or ended. Idempotent."""
        self._trials.pop(trial, None)
        self._ended.set()
