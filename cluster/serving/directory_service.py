"""The directory under Serve: one replica; groups and gateways put themselves in, gateways watch.

It also keeps what the cluster was started with, the secret among it, for the commands that change the cluster. Serve
keeps that in turn, so a new replica has it again.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray

from moestro.cluster.directory_calls import DirectoryServer
from moestro.cluster.serving.logs import log_to_ray
from moestro.cluster.serving.plan import Plan
from moestro.cluster.serving.specs import group_of_actor

log = logging.getLogger(__name__)

NAMES_S = 2.0


class DirectoryService(DirectoryServer):
    """Ready at once, settled when every group whose ranks run has reported."""

    async def __init__(self, secret: str) -> None:  # type: ignore[misc]
        log_to_ray()
        super().__init__(await _running_groups())
        self._secret = secret
        self._settings: dict[str, Any] = {}

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Called by Serve at start and whenever they change."""
        self._settings = settings

    async def plan(self) -> Plan:
        return Plan.of(self._settings, self._secret)


async def _running_groups() -> frozenset[str] | None:
    """Groups that have ranks now; None when Ray does not say."""
    try:
        names = await asyncio.wait_for(asyncio.to_thread(ray.util.list_named_actors, True), NAMES_S)
    except Exception as error:
        log.warning("which groups run is not known: %s", error)
        return None
    groups = frozenset(group for name in names if (group := group_of_actor(name["name"])))
    log.info("groups that run: %s", ", ".join(sorted(groups)) or "none")
    return groups
