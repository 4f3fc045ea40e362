"""A gateway under Serve. Imports no torch: a gateway computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from moestro.cluster.config import Config
from moestro.cluster.directory import GatewayEntry
from moestro.cluster.gateway import Gateway, advertised
from moestro.cluster.serving.logs import log_to_ray

log = logging.getLogger(__name__)

RETRY_S = 1.0
REPORT_S = 2.0
FAREWELL_S = 0.5  # the directory may be stopping too, and then nobody needs to hear that we go


class GatewayService:
    """Ready when a rank is attached, the port is open and the directory knows it."""

    async def __init__(  # type: ignore[misc]
        self,
        config: Config,
        secret: str,
        directory: DeploymentHandle[Any],
        groups: DeploymentHandle[Any],  # not called: binding it makes Serve start the groups
    ) -> None:
        log_to_ray()
        self._directory = directory
        name = f"gateway-{uuid.uuid4().hex[:8]}"
        self._gateway = Gateway(config, secret, gateway_id=name)
        self._tasks = [asyncio.create_task(self._watch())]
        port = await self._gateway.start()
        here = ray.util.get_node_ip_address() if config.cluster.ray_address else "localhost"
        self._entry = GatewayEntry(name, advertised(config.server.host, port, here))
        await directory.put_gateway.remote(self._entry)
        self._tasks.append(asyncio.create_task(self._report()))

    async def check_health(self) -> None:
        if any(task.done() for task in self._tasks):
            raise RuntimeError("the gateway no longer talks to the directory")

    async def __del__(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._directory.remove_gateway.remote(self._entry.name), FAREWELL_S)
        await self._gateway.stop()
        for task in self._tasks:
            task.cancel()

    async def _watch(self) -> None:
        version = -1
        while True:
            try:
                snapshot = await self._directory.watch.remote(version)
            except Exception as error:  # the directory is being replaced: what we know stays true meanwhile
                log.warning("directory: %s", error)
                version = -1
                await asyncio.sleep(RETRY_S)
                continue
            version = snapshot.version
            self._gateway.update(snapshot.groups)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            with contextlib.suppress(Exception):  # being replaced; the next report reaches the new one
                await self._directory.put_gateway.remote(self._entry)
