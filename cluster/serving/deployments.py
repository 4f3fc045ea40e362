"""The cluster as Ray Serve sees it: three deployments, named as a person reads them in the dashboard.

    Directory   who is alive (one replica)
    Group       one copy of the model; its ranks are actors in the replica's placement group
    Gateway     the gRPC edge; tokens never pass through Serve

Serve owns lifecycle (start order, health, restart, drain); control messages go through Serve handles, tokens through
our own sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moestro.cluster.config import Config
from moestro.cluster.directory import Directory, GroupEntry, RankEntry
from moestro.cluster.gateway import Gateway
from moestro.cluster.serving.rank_actor import Rank, RankPlace
from moestro.cluster.serving.specs import rank_resources, rank_spec
from moestro.router.mesh import serve_store

log = logging.getLogger(__name__)

APP_NAME = "moestro"
WATCH_S = 10.0  # a watch answers at least so often, so that a gateway notices a directory that was replaced
PROGRESS_S = 0.2
HEALTH_TIMEOUT_S = 5.0


class DirectoryService:
    """The directory behind a Serve handle."""

    def __init__(self) -> None:
        self._directory = Directory()
        self._changed = asyncio.Event()

    async def begin_epoch(self, name: str) -> int:
        """A new epoch for a group: whatever an earlier replica of it still says is refused from now on."""
        return self._directory.begin_epoch(name)

    async def put(self, group: GroupEntry) -> None:
        if self._directory.put(group):
            self._notify()

    async def remove(self, name: str, epoch: int) -> None:
        if self._directory.remove(name, epoch):
            self._notify()

    async def watch(self, version: int) -> tuple[int, tuple[GroupEntry, ...]]:
        """Answers when there is another version than ``version`` (-1: at once), or after WATCH_S."""
        changed = self._changed
        if version == self._directory.version:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), WATCH_S)
        return self._directory.version, self._directory.snapshot()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
        await self._directory.remove.remote(self._entry.name, self._entry.epoch)
        with contextlib.suppress(Exception):  # a rank that is gone has nothing left to drain
            await asyncio.gather(*(actor.drain.remote(self._drain_s) for actor in self._actors))
            await asyncio.gather(*(actor.stop.remote() for actor in self._actors))

    async def _report(self) -> None:
        ranks = await asyncio.gather(*(actor.entry.remote() for actor in self._actors))
        self._entry = replace(self._entry, ranks=tuple(ranks))
        await self._directory.put.remote(self._entry)


class GatewayService:
    """A gateway under Serve. Ready when a rank is attached and the port is open."""

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
                await asyncio.sleep(1.0)
                continue
            self._gateway.update(groups)


def build_app(config: Config, secret: str) -> serve.Application:
    """The three deployments, bound to each other."""
    cluster, drain_s = config.cluster, config.server.drain_s
    light = {"num_cpus": 0}
    lifecycle = {
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": drain_s + 10.0,
    }
    directory = (
        serve.deployment(DirectoryService, name="Directory").options(ray_actor_options=light, **lifecycle).bind()
    )
    groups = (
        serve.deployment(GroupService, name="Group")
        .options(
            num_replicas=cluster.groups,
            ray_actor_options=light,
            placement_group_bundles=[{"CPU": 0.001}, *[_bundle(config)] * (cluster.dp * cluster.tp)],
            placement_group_strategy="PACK",
            **lifecycle,
        )
        .bind(config, secret, directory)
    )
    return (
        serve.deployment(GatewayService, name="Gateway")
        .options(num_replicas=cluster.gateways, ray_actor_options=light, **lifecycle)
        .bind(config, secret, directory, groups)
    )


def _bundle(config: Config) -> dict[str, float]:
    resources = rank_resources(config)
    return {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
