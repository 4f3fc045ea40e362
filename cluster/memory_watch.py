"""Looks at memory now and then, and says when it is short and when it is so no longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from moestro.cluster.memory import MemoryReading, Pressure, pressure

log = logging.getLogger(__name__)

LOOK_S = 0.5
MIB = 2**20


class Reader(Protocol):
    """``memory_reader.MemoryReader``, or a test's."""

    def read(self) -> MemoryReading: ...


async def watch_memory(reader: Reader, on_change: Callable[[Pressure], None], every_s: float = LOOK_S) -> None:
    """Until cancelled; ``on_change`` is called on this loop, the first time when memory is short."""
    now = Pressure.NONE
    while True:
        reading = reader.read()
        before, now = now, pressure(reading, now)
        if now is not before:
            log.warning("memory: %d of %d MiB free: %s", reading.free // MIB, reading.total // MIB, _WORDS[now])
            on_change(now)
        await asyncio.sleep(every_s)


_WORDS = {
    Pressure.NONE: "enough again",
    Pressure.NEW: "taking nothing new",
    Pressure.WAITING: "giving up what waits",
}
