"""A rank as a Ray actor: a thin shell around its process, and what its group's supervisor holds of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

from moestro.cluster.ranks.report import RankPlace, RankReport
from moestro.cluster.serving.logs import log_to_ray
from moestro.cluster.serving.reasons import reason_in
from moestro.cluster.supervisor import Held, WorkerGone
from moestro.router.view import View

if TYPE_CHECKING:  # they bring torch: the group, which names this class, is quicker without
    from moestro.cluster.ranks.process import RankProcess
    from moestro.workers.rank_setup import RankSpec


class Rank:
    """One worker of a group. Its methods run on the actor's asyncio loop."""

    def __init__(self, name: str) -> None:
        log_to_ray()
        # Other ranks, gateways and Ray share the cores (figures in kernels/README.md). torch is not imported yet.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self._name = name
        self._process: RankProcess | None = None

    def __repr__(self) -> str:
        return self._name

    async def start(self, spec: RankSpec, place: RankPlace) -> tuple[str, int]:
        """Begins to load; says which process this is: Ray's node, and the number there."""
        from moestro.cluster.ranks.process import RankProcess

        self._process = RankProcess(spec, place)
        self._process.start()
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def watch(self, version: int) -> RankReport:
        return await self._started.watch(version)

    async def form(self, view: View) -> None:
        await self._started.form(view)

    async def holdings(self) -> Held:
        return await self._started.holdings()

    async def drain(self, seconds: float) -> None:
        await self._started.drain(seconds)

    async def stop(self) -> None:
        await self._started.stop()

    @property
    def _started(self) -> RankProcess:
        assert self._process is not None, "start comes first"
        return self._process


class RankHandle:
    """Implements ``WorkerHandle``. Ray tells of the end of an actor anywhere; on this host the kernel tells at once,
    and ends a process that is stopped."""

    def __init__(self, actor: Any, node: str, pid: int) -> None:
        self._actor = actor
        self._pidfd = -1
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(OSError):  # it has ended already: the watch says so
                self._pidfd = os.pidfd_open(pid)
                asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    async def watch(self, version: int) -> RankReport:
        try:
            report: RankReport = await self._actor.watch.remote(version)
        except RayActorError as error:
            if isinstance(error, ActorUnavailableError):
                raise
            raise WorkerGone(reason_in(str(error))) from None
        return report

    async def gone(self) -> str:
        return await asyncio.shield(self._ended)

    async def form(self, view: View) -> None:
        await self._actor.form.remote(view)

    async def holdings(self) -> Held:
        holdings: Held = await self._actor.holdings.remote()
        return holdings

    async def drain(self, seconds: float) -> None:
        await self._actor.drain.remote(seconds)

    async def stop(self) -> None:
        await self._actor.stop.remote()

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._forget_actor()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if not self._ended.done():
            self._ended.set_result("its process has ended")
        self._forget_actor()

    def _forget_actor(self) -> None:
        """In a thread: where Ray's head is away it waits for it. Ray may know already."""

        def kill() -> None:
            with contextlib.suppress(Exception):
                ray.kill(self._actor)

        asyncio.get_running_loop().run_in_executor(None, kill)
