"""Reads how much memory this process can still have: of its own limit, of the cgroups it is in, of the machine.

cgroup v2: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory. What can be reclaimed (inactive file pages) is not
counted as used, as the kubelet does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from moestro.cluster.memory import MemoryReading

CGROUPS = Path("/sys/fs/cgroup")


class MemoryReader:
    """``limit`` is the bytes this process may have resident; 0: as many as there are."""

    def __init__(self, limit: int = 0, root: Path = CGROUPS, own_cgroup: Path = Path("/proc/self/cgroup")) -> None:
        self._limit = limit
        self._groups = tuple(cgroups(root, own_cgroup))
        self._process = psutil.Process()

    def read(self) -> MemoryReading:
        """Some tens of microseconds."""
        machine = psutil.virtual_memory()
        readings = [MemoryReading(machine.available, machine.total)]
        for group in self._groups:
            with suppress(OSError, ValueError):  # a limit that was taken away, or a group that is gone
                readings.append(read_cgroup(group))
        if self._limit:
            readings.append(MemoryReading(self._limit - self._process.memory_info().rss, self._limit))
        return min(readings, key=lambda reading: reading.free)


def cgroups(root: Path, own_cgroup: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and those above it that have a limit; none where there is no cgroup v2."""
    with suppress(OSError):
        for line in own_cgroup.read_text().splitlines():
            if line.startswith("0::"):
                own = root / line.removeprefix("0::").strip().lstrip("/")
                for folder in (own, *own.parents):
                    if folder.is_relative_to(root) and (folder / "memory.max").is_file():
                        yield folder


def read_cgroup(folder: Path) -> MemoryReading:
    """Raises ValueError when the group has no limit ("max"), OSError when it cannot be read."""
    limit = int((folder / "memory.max").read_text())
    used = int((folder / "memory.current").read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return MemoryReading(limit - used + int(stat.get("inactive_file", 0)), limit)
