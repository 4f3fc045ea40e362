"""A gateway under Serve. Imports no torch: a gateway computes nothing."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

from ray.serve.handle import DeploymentHandle

from moestro.cluster.config import Config
from moestro.cluster.gateway import Gateway

log = logging.getLogger(__name__)

RETRY_S = 1.0


class GatewayService:
    """Ready when a rank is attached and the port is open."""

    async def __init__(  # type: ignore[misc]
        self,
        config: Config,
        secret: str,
        directory: DeploymentHandle[Any],
        groups: DeploymentHandle[Any],  # not called: binding it makes Serve start the groups
    ) -> None:
        self._directory = directory
        self._gateway = Gateway(config, secret, gateway_id=uuid.uuid4().hex[:12])
        self._watching = asyncio.create_task(self._watch())
        await self._gateway.start()

    async def check_health(self) -> None:
        if self._watching.done():
            raise RuntimeError("the gateway no longer watches the directory")

    async def __del__(self) -> None:
        await self._gateway.stop()
        self._watching.cancel()

    async def _watch(self) -> None:
        version = -1
        while True:
            try:
                version, groups = await self._directory.watch.remote(version)
            except Exception as error:  # the directory is being replaced: what we know stays true meanwhile
                log.warning("directory: %s", error)
                version = -1
                await asyncio.sleep(RETRY_S)
                continue
            self._gateway.update(groups)
