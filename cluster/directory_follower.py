"""How a gateway keeps up with the directory, and goes on without it while it is being replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from moestro.cluster.directory import GatewayEntry, GatewayReport, GroupEntry
from moestro.cluster.directory_calls import DirectoryCalls

log = logging.getLogger(__name__)

RETRY_S = 0.5
REPORT_S = 2.0


class DirectoryFollower:
    """``update`` is called on the loop with each picture of the groups that is worth going by; ``attached`` names those
    to which there are connections."""

    def __init__(
        self,
        directory: DirectoryCalls,
        update: Callable[[tuple[GroupEntry, ...]], None],
        attached: Callable[[], frozenset[str]],
    ) -> None:
        self._directory = directory
        self._update, self._attached = update, attached
        self._groups: tuple[GroupEntry, ...] = ()
        self._epochs: dict[str, int] = {}  # the last heard of each group, of those that are gone too
        self._gateway: GatewayEntry | None = None

    async def follow(self) -> None:
        """Takes pictures, for ever. Without an answer what is known stays true."""
        version = -1
        while True:
            try:
                snapshot = await self._directory.watch(version)
            except Exception as error:
                log.warning("directory: %s", error)
                version = -1
                await asyncio.sleep(RETRY_S)
                continue
            version = snapshot.version
            self._groups = snapshot.over(self._groups)
            for group in self._groups:
                self._epochs[group.name] = max(group.epoch, self._epochs.get(group.name, 0))
            self._update(self._groups)
            if not snapshot.settled:  # it is new, and may give away an epoch that nobody else remembers
                await self.tell()

    async def arrive(self, gateway: GatewayEntry) -> None:
        """The gateway is there from now on; says so once."""
        self._gateway = gateway
        await self.tell()

    async def report(self) -> None:
        """Says that the gateway is there, for ever."""
        while True:
            await asyncio.sleep(REPORT_S)
            await self.tell()

    async def tell(self) -> None:
        """Once, if the directory can be reached; the next report reaches the next one."""
        if self._gateway is not None:
            report = GatewayReport(dict(self._epochs), self._attached())
            with contextlib.suppress(Exception):
                await self._directory.put_gateway(self._gateway, report)
