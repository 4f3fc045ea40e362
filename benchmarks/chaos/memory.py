"""What every process of a cluster holds over time, and how fast that grows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from benchmarks.chaos.system import System

EVERY_S = 2.0
MB = 1e6
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment. ``bytes`` are its own: what would be free without it."""

    at_s: float
    bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class History:
    """One process through its life."""

    title: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    def after(self, warm_up_s: float) -> list[Sample]:
        """Without the first seconds of its own life, in which it loads and fills its caches."""
        return [each for each in self.samples if each.at_s - self.samples[0].at_s >= warm_up_s]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: how much the second grows for each one of the first. 0.0 for fewer than two places."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return covariance / sum((x - mean_x) ** 2 for x, _ in points)


def mb_per_minute(samples: Sequence[Sample]) -> float:
    return slope([(sample.at_s / 60.0, sample.bytes / MB) for sample in samples])


class Watch:
    """Samples every process of a system until its task is cancelled."""

    def __init__(self, system: System, clock: Callable[[], float]) -> None:
        self._system, self._clock = system, clock
        self.histories: dict[tuple[int, float], History] = {}  # by pid and when it was started
        self.segments: list[tuple[float, int]] = []  # of shared memory on this machine

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._sample)
            await asyncio.sleep(EVERY_S)

    def _sample(self) -> None:
        now_s = self._clock()
        self.segments.append((now_s, len(list(SHARED_MEMORY.iterdir())) if SHARED_MEMORY.exists() else 0))
        for process in self._system.processes():
            with suppress(psutil.Error):
                key = process.pid, process.create_time()
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                known = self.histories.get(key, History("", process.pid))
                self.histories[key] = replace(known, title=title_of(process))  # Ray gives an actor its title later
                sample = Sample(now_s, process.memory_full_info().uss, process.num_fds(), process.num_threads())
                self.histories[key].samples.append(sample)


def title_of(process: psutil.Process) -> str:
    """What a person recognises it by, without paths."""
    command = " ".join(process.cmdline()) or process.name()
    return re.sub(r"\S*/", "", command)[:60]
