"""The directory as others talk to it, and what stands behind it: one loop, one table. Knows no transport; the clock is
the loop's."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from moestro.cluster.directory import Directory, GatewayEntry, GatewayReport, GroupEntry, Snapshot

# A watch answers at least so often: a gateway notices a directory that was replaced, and Serve, which lets open calls
# finish before it stops a replica, does not wait long.
WATCH_S = 0.5


class DirectoryCalls(Protocol):
    """Each call may fail, or not come back for a while, when the directory is being replaced. All may be repeated."""

    async def begin(self, dp: int, tp: int) -> GroupEntry:
        """A name and an epoch for a new group; it must report from now on. Waits until the directory is settled."""

    async def put(self, group: GroupEntry) -> bool:
        """Says whether the group still has its place."""

    async def remove(self, name: str, epoch: int) -> None: ...

    async def put_gateway(self, gateway: GatewayEntry, report: GatewayReport) -> None:
        """The gateway is there."""

    async def remove_gateway(self, name: str) -> None: ...

    async def watch(self, version: int) -> Snapshot:
        """Answers when there is another version than ``version`` (-1: at once), or after WATCH_S."""


class DirectoryServer:
    """Implements ``DirectoryCalls`` over a table in this process."""

    def __init__(self, expected: frozenset[str] | None = frozenset()) -> None:
        """``expected``: see ``Directory``."""
        self._directory = Directory(expected, born_s=_now_s())
        self._changed = asyncio.Event()

    async def begin(self, dp: int, tp: int) -> GroupEntry:
        self._directory.hear(_now_s())
        while not self._directory.settled:
            await self.watch(self._directory.version)
        group = self._directory.begin(dp, tp, _now_s())
        self._notify()
        return group

    async def put(self, group: GroupEntry) -> bool:
        self._directory.hear(_now_s())
        version = self._directory.version
        accepted = self._directory.put(group, _now_s())
        if self._directory.version != version:
            self._notify()
        return accepted

    async def remove(self, name: str, epoch: int) -> None:
        self._directory.remove(name, epoch)
        self._notify()

    async def put_gateway(self, gateway: GatewayEntry, report: GatewayReport) -> None:
        self._directory.hear(_now_s())
        self._directory.put_gateway(gateway, report, _now_s())

    async def remove_gateway(self, name: str) -> None:
        self._directory.remove_gateway(name)

    async def watch(self, version: int) -> Snapshot:
        changed = self._changed
        self._directory.hear(_now_s())
        self._directory.expire(_now_s())
        if version == self._directory.version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), WATCH_S)
            self._directory.expire(_now_s())
        return self._directory.snapshot()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
