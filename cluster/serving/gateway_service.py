"""A gateway under Serve. Imports no torch: a gateway computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from moestro.cluster.config import Config
from moestro.cluster.directory import GatewayEntry
from moestro.cluster.directory_follower import DirectoryFollower
from moestro.cluster.gateway import Gateway, advertised
from moestro.cluster.heap import freeze_heap
from moestro.cluster.serving.directory_client import DirectoryClient
from moestro.cluster.serving.logs import log_to_ray

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
        self._directory = DirectoryClient(directory)
        name = f"gateway-{uuid.uuid4().hex[:8]}"
        self._gateway = Gateway(config, secret, gateway_id=name)
        follower = DirectoryFollower(self._directory, self._gateway.update, self._gateway.attached_groups)
        self._following = asyncio.create_task(follower.follow())
        port = await self._gateway.start()
        here = ray.util.get_node_ip_address() if config.cluster.ray_address else "localhost"
        self._entry = GatewayEntry(name, advertised(config.server.host, port, here))
        freeze_heap()
        await follower.arrive(self._entry)
        self._reporting = asyncio.create_task(follower.report())

    async def check_health(self) -> None:
        if self._following.done() or self._reporting.done():
            raise RuntimeError("the gateway no longer talks to the directory")

    async def __del__(self) -> None:
        """Serve calls this when the replica has to go. It follows the directory until its last stream has ended."""
        self._reporting.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._directory.remove_gateway(self._entry.name), FAREWELL_S)
        await self._gateway.stop()
        self._following.cancel()
