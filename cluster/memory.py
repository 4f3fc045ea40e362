"""What to do as memory runs short, before the kernel does it for us: first nothing new is taken, then what waits is
given up. What runs goes on. The policy is pure; ``cluster/memory_reader.py`` reads the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

MIN_RESERVE = 64 * 2**20  # bytes
MAX_RESERVE = 2**30
RESERVE = 1 / 50  # of all there is
RELIEF = 1.25  # times a threshold that must be free before it counts as passed again: no flutter


class Pressure(IntEnum):
    """How short memory is."""

    NONE = 0
    NEW = 1  # nothing new is taken
    WAITING = 2  # and what waits is given up


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes. The tightest of the limits that this process lives under: its own, its cgroups', the machine's."""

    free: int
    total: int


def reserve(total: int) -> int:
    """Bytes that are to stay free: a fiftieth of all, within bounds."""
    return int(min(max(total * RESERVE, MIN_RESERVE), MAX_RESERVE, total / 4))


def pressure(reading: MemoryReading, before: Pressure) -> Pressure:
    """Nothing new below the reserve, nothing waiting below half of it."""
    for level, share in ((Pressure.WAITING, 0.5), (Pressure.NEW, 1.0)):
        threshold = reserve(reading.total) * share
        if reading.free < (threshold * RELIEF if before >= level else threshold):
            return level
    return Pressure.NONE
