"""The directory behind a Serve handle."""

from __future__ import annotations

import asyncio
import contextlib

from moestro.cluster.directory import Directory, GroupEntry

WATCH_S = 10.0  # a watch answers at least so often, so that a gateway notices a directory that was replaced


class DirectoryService:
    """One replica; groups put themselves in, gateways watch."""

    def __init__(self) -> None:
        self._directory = Directory()
        self._changed = asyncio.Event()

    async def begin_epoch(self, name: str) -> int:
        """A new epoch for a group: whatever an earlier replica of it still says is refused from now on."""
        return self._directory.begin_epoch(name)

    async def put(self, group: GroupEntry) -> None:
        if self._directory.put(group):
            self._notify()

    async def remove(self, name: str, epoch: int) -> None:
        if self._directory.remove(name, epoch):
            self._notify()

    async def watch(self, version: int) -> tuple[int, tuple[GroupEntry, ...]]:
        """Answers when there is another version than ``version`` (-1: at once), or after WATCH_S."""
        changed = self._changed
        if version == self._directory.version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), WATCH_S)
        return self._directory.version, self._directory.snapshot()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
