"""A group under Serve: its ranks are actors in the replica's placement group."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moestro.cluster.config import Config
from moestro.cluster.membership_records import MembershipConfig
from moestro.cluster.ranks.report import RankPlace
from moestro.cluster.serving.directory_client import DirectoryClient
from moestro.cluster.serving.logs import log_to_ray
from moestro.cluster.serving.rank_actor import Rank, RankHandle
from moestro.cluster.serving.specs import rank_resources, watchdog_s
from moestro.cluster.supervisor import Held, Supervisor
from moestro.router.parallel import GroupShape


class GroupService:
    """One group: its supervisor, over actors. Ready when it serves."""

    async def __init__(  # type: ignore[misc]
        self, config: Config, secret: str, directory: DeploymentHandle[Any], gpus_per_rank: float
    ) -> None:
        log_to_ray()
        self._config, self._secret, self._gpus = config, secret, gpus_per_rank
        self._host = ray.util.get_node_ip_address() if config.cluster.ray_address else "127.0.0.1"
        self._placement = ray.util.get_current_placement_group()
        calls = DirectoryClient(directory)
        self._entry = await calls.begin(config.cluster.dp, config.cluster.tp)
        self._supervisor = Supervisor(
            membership_config(config, gpus_per_rank),
            self._entry,
            calls,
            self._launch,
            drain_s=config.server.drain_s,
            redundant=config.experts.redundant,
        )
        self._actors = {seat: self._actor(seat, seat) for seat in range(config.cluster.dp * config.cluster.tp)}
        # Imported only now: it brings torch, and the ranks do the same meanwhile.
        from moestro.cluster.serving.rank_spec import rank_spec
        from moestro.router.mesh import serve_store

        self._spec = rank_spec(config)
        self._store, self._store_address = serve_store(self._host)
        try:
            await self._supervisor.start()
        except BaseException:
            await self._supervisor.stop()
            raise

    async def check_health(self) -> None:
        """Raises when the group is over: Serve then replaces it. One that recovers is well."""
        self._supervisor.check()

    async def __del__(self) -> None:
        """Serve calls this when the replica has to go: what runs may finish first."""
        await self._supervisor.drain(self._config.server.drain_s)
        await self._supervisor.stop()

    async def _launch(self, seat: int, worker: int, held: Held | None, gently: bool) -> RankHandle:
        # In a thread: where Ray's head is away a named actor waits for it.
        actor = self._actors.pop(worker, None) or await asyncio.to_thread(self._actor, seat, worker)
        tp = self._config.cluster.tp
        place = RankPlace(
            self._entry.name, seat, worker, tp, self._store_address, self._host, self._secret, held, gently
        )
        node, pid = await actor.start.remote(self._spec, place)
        return RankHandle(actor, node, pid)

    def _actor(self, seat: int, worker: int) -> Any:
        """A new process in the seat's bundle, which is free once the one before has ended."""
        place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=seat + 1)
        name = f"{self._entry.name} rank {seat}"
        return (
            ray.remote(Rank)
            .options(
                name=f"{name} worker {self._entry.epoch}.{worker}",
                scheduling_strategy=place,
                enable_task_events=False,  # of a poll every half second; the head would keep them all
                **rank_resources(self._config, self._gpus),
            )
            .remote(name)
        )


def membership_config(config: Config, gpus_per_rank: float) -> MembershipConfig:
    """The rules of a group."""
    return MembershipConfig(
        shape=GroupShape(config.cluster.dp, config.cluster.tp),
        min_ranks=config.recovery.min_ranks,
        replace=config.recovery.replace,
        watchdog_s=watchdog_s(config, gpus_per_rank),
        start_s=config.cluster.start_timeout_s,
    )
