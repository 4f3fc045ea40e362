"""A group under Serve: its ranks are actors in the replica's placement group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.serving.directory_client import DirectoryClient
from moestro.cluster.serving.logs import log_to_ray
from moestro.cluster.serving.rank_actor import Rank, RankPlace
from moestro.cluster.serving.specs import rank_resources

log = logging.getLogger(__name__)

PROGRESS_S = 0.2
HEALTH_TIMEOUT_S = 5.0
FAREWELL_S = 0.5  # the directory may be stopping too, and then nobody needs to hear that we go


class GroupService:
    """One group: starts its ranks, tells the directory, watches over them, drains them. Ready when it serves."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, secret: str, directory: DeploymentHandle[Any], gpus_per_rank: float
    ) -> None:
        log_to_ray()
        self._directory = DirectoryClient(directory)
        self._drain_s = config.server.drain_s
        cluster = config.cluster
        self._entry: GroupEntry = await self._directory.begin(cluster.dp, cluster.tp)
        on_loopback = not cluster.ray_address
        self._actors = [self._actor(rank, config, gpus_per_rank) for rank in range(cluster.dp * cluster.tp)]
        # Imported only now: it brings torch, and the ranks do the same meanwhile.
        from moestro.cluster.serving.rank_spec import rank_spec
        from moestro.router.mesh import serve_store

        self._store, store_address = serve_store("127.0.0.1" if on_loopback else ray.util.get_node_ip_address())
        places = [
            RankPlace(self._entry.name, rank, self._entry.epoch, store_address, on_loopback, secret)
            for rank in range(len(self._actors))
        ]
        spec = rank_spec(config)
        starting = asyncio.gather(
            *(actor.start.remote(spec, place) for actor, place in zip(self._actors, places, strict=True))
        )
        try:
            while not starting.done():
                await asyncio.wait([starting], timeout=PROGRESS_S)
                with contextlib.suppress(Exception):  # what is wrong with a rank is said by start itself
                    await self._look()
                    await self._report()
            await starting
            await self._look()
            await self._report()
        except BaseException:
            await self._farewell()
            raise

    async def check_health(self) -> None:
        """Raises when a rank has died or another group took our place: Serve then replaces the group."""
        try:
            await asyncio.wait_for(self._look(), HEALTH_TIMEOUT_S)
        except Exception as error:
            log.error("%s is lost: %s", self._entry.name, error)
            lost = tuple(replace(rank, state=RankState.LOST) for rank in self._entry.ranks)
            self._entry = replace(self._entry, ranks=lost)
            await self._report()
            raise
        if not await self._report():
            raise RuntimeError(f"{self._entry.name} epoch {self._entry.epoch} is over")

    async def __del__(self) -> None:
        """Serve calls this when the replica has to go: what runs may finish first."""
        await self._farewell()
        with contextlib.suppress(Exception):  # a rank that is gone has nothing left to drain
            await asyncio.gather(*(actor.drain.remote(self._drain_s) for actor in self._actors), return_exceptions=True)
            await asyncio.gather(*(actor.stop.remote() for actor in self._actors), return_exceptions=True)

    async def _farewell(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._directory.remove(self._entry.name, self._entry.epoch), FAREWELL_S)

    async def _look(self) -> None:
        ranks: list[RankEntry] = await asyncio.gather(*(actor.entry.remote() for actor in self._actors))
        self._entry = replace(self._entry, ranks=tuple(ranks))

    async def _report(self) -> bool:
        """Says whether the group still has its place. A directory that is being replaced hears of us the next time."""
        try:
            return await self._directory.put(self._entry)
        except Exception as error:
            log.warning("directory: %s", error)
            return True

    def _actor(self, rank: int, config: Config, gpus_per_rank: float) -> Any:
        placement = ray.util.get_current_placement_group()
        name = f"{self._entry.name} rank {rank}"
        return (
            ray.remote(Rank)
            .options(
                name=f"{name} epoch {self._entry.epoch}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank + 1),
                **rank_resources(config, gpus_per_rank),
            )
            .remote(name, RankEntry(rank // config.cluster.tp, rank % config.cluster.tp))
        )
