"""The directory through its Serve handle."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from moestro.cluster.directory import SETTLE_S, GatewayEntry, GatewayReport, GroupEntry, Snapshot
from moestro.cluster.serving.plan import Plan

log = logging.getLogger(__name__)

ASK_S = 3.0  # a handle waits for a replica as long as there is none; what we would say is old by then
RETRY_S = 0.5


class DirectoryClient:
    """Implements ``DirectoryCalls``. What is not answered in time raises TimeoutError; a handle raises its own errors
    when the replica dies under a call."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def begin(self, dp: int, tp: int) -> GroupEntry:
        """Asks until it is told: a group cannot start without. A name that was given and did not reach us expires."""
        while True:
            try:
                group: GroupEntry = await asyncio.wait_for(self._handle.begin.remote(dp, tp), SETTLE_S + ASK_S)
                return group
            except Exception as error:
                log.warning("directory: %s", error)
                await asyncio.sleep(RETRY_S)

    async def put(self, group: GroupEntry) -> bool:
        return bool(await asyncio.wait_for(self._handle.put.remote(group), ASK_S))

    async def remove(self, name: str, epoch: int) -> None:
        await asyncio.wait_for(self._handle.remove.remote(name, epoch), ASK_S)

    async def put_gateway(self, gateway: GatewayEntry, report: GatewayReport) -> None:
        await asyncio.wait_for(self._handle.put_gateway.remote(gateway, report), ASK_S)

    async def remove_gateway(self, name: str) -> None:
        await asyncio.wait_for(self._handle.remove_gateway.remote(name), ASK_S)

    async def watch(self, version: int) -> Snapshot:
        snapshot: Snapshot = await asyncio.wait_for(self._handle.watch.remote(version), ASK_S)
        return snapshot

    async def plan(self) -> Plan:
        plan: Plan = await asyncio.wait_for(self._handle.plan.remote(), ASK_S)
        return plan
