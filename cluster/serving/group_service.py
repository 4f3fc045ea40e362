"""A group under Serve: its ranks are actors in the replica's placement group."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry, RankEntry
from moestro.cluster.serving.rank_actor import Rank, RankPlace
from moestro.cluster.serving.specs import rank_resources, rank_spec
from moestro.router.mesh import serve_store

PROGRESS_S = 0.2
HEALTH_TIMEOUT_S = 5.0
FAREWELL_S = 0.5  # the directory may be stopping too, and then nobody needs to hear that we go


class GroupService:
    """One group: starts its ranks, tells the directory, watches over them, drains them. Ready when it serves."""

    async def __init__(self, config: Config, secret: str, directory: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        self._directory = directory
        self._drain_s = config.server.drain_s
        name = f"group-{serve.get_replica_context().rank.rank}"
        epoch = await directory.begin_epoch.remote(name)
        spec = rank_spec(config)
        entries = tuple(
            RankEntry(spec.shape.dp_rank(rank), spec.shape.tp_rank(rank)) for rank in range(spec.shape.world_size)
        )
        self._entry = GroupEntry(name, spec.shape.dp, spec.shape.tp, epoch, entries)
        host = ray.util.get_node_ip_address() if config.cluster.ray_address else "127.0.0.1"
        self._store, store_address = serve_store(host)
        placement = ray.util.get_current_placement_group()
        self._actors = [
            ray.remote(Rank)
            .options(
                name=f"{name}/rank-{rank} epoch {epoch}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank + 1),
                **rank_resources(config),
            )
            .remote(spec, RankPlace(name, rank, epoch, store_address, not bool(config.cluster.ray_address), secret))
            for rank in range(spec.shape.world_size)
        ]
        starting = asyncio.gather(*(actor.start.remote() for actor in self._actors))
        while not starting.done():
            await asyncio.wait([starting], timeout=PROGRESS_S)
            with contextlib.suppress(ray.exceptions.RayActorError):
                await self._report()
        await starting
        await self._report()

    async def check_health(self) -> None:
        """Raises when a rank has died: Serve then replaces the group."""
        await asyncio.wait_for(self._report(), HEALTH_TIMEOUT_S)

    async def __del__(self) -> None:
        """Serve calls this when the replica has to go: what runs may finish first."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._directory.remove.remote(self._entry.name, self._entry.epoch), FAREWELL_S)
        with contextlib.suppress(Exception):  # a rank that is gone has nothing left to drain
            await asyncio.gather(*(actor.drain.remote(self._drain_s) for actor in self._actors))
            await asyncio.gather(*(actor.stop.remote() for actor in self._actors))

    async def _report(self) -> None:
        ranks = await asyncio.gather(*(actor.entry.remote() for actor in self._actors))
        self._entry = replace(self._entry, ranks=tuple(ranks))
        await self._directory.put.remote(self._entry)
