"""The directory behind a Serve handle."""

from __future__ import annotations

import asyncio
import contextlib
import time

from moestro.cluster.directory import Directory, GatewayEntry, GroupEntry, Snapshot
from moestro.cluster.serving.logs import log_to_ray

# A watch answers at least so often: a gateway notices a directory that was replaced, and Serve, which lets open calls
# finish before it stops a replica, does not wait long.
WATCH_S = 0.5


class DirectoryService:
    """One replica; groups and gateways put themselves in, gateways watch."""

    def __init__(self) -> None:
        log_to_ray()
        self._directory = Directory()
        self._changed = asyncio.Event()

    async def begin(self, dp: int, tp: int) -> GroupEntry:
        """A name and an epoch for a new group; it must report from now on."""
        group = self._directory.begin(dp, tp, time.monotonic())
        self._notify()
        return group

    async def put(self, group: GroupEntry) -> bool:
        """Says whether the group still has its place."""
        version = self._directory.version
        accepted = self._directory.put(group, time.monotonic())
        if self._directory.version != version:
            self._notify()
        return accepted

    async def remove(self, name: str, epoch: int) -> None:
        self._directory.remove(name, epoch)
        self._notify()

    async def put_gateway(self, gateway: GatewayEntry) -> None:
        self._directory.put_gateway(gateway, time.monotonic())

    async def remove_gateway(self, name: str) -> None:
        self._directory.remove_gateway(name)

    async def watch(self, version: int) -> Snapshot:
        """Answers when there is another version than ``version`` (-1: at once), or after WATCH_S."""
        changed = self._changed
        self._directory.expire(time.monotonic())
        if version == self._directory.version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), WATCH_S)
        return self._directory.snapshot()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
