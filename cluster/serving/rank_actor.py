"""A rank as a Ray actor: an engine thread, and the server that gateways attach to."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc
import psutil
import ray

from moestro.cluster.directory import RankEntry, RankState
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.cluster.serving.logs import log_to_ray
from moestro.protos.gen import rank_pb2_grpc

if TYPE_CHECKING:  # they bring torch: the group, which names this class, is quicker without
    from moestro.router.mesh import StoreAddress
    from moestro.workers.loading import Progress
    from moestro.workers.rank_loop import StepOutput
    from moestro.workers.rank_setup import RankSpec
    from moestro.workers.worker import Worker

log = logging.getLogger(__name__)

JOIN_S = 5.0  # an engine in the middle of a step ends at the head of the next


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one rank stands: its group, its number there, and how the group's members find each other."""

    group: str
    rank: int
    epoch: int
    store: StoreAddress
    on_loopback: bool  # the cluster is this machine alone: nothing listens to the outside
    secret: str


class Rank:
    """One worker of a group. Its methods run on the actor's asyncio loop, the engine on a thread of its own."""

    def __init__(self, name: str, entry: RankEntry) -> None:
        log_to_ray()
        # Other ranks, gateways and Ray share the cores (figures in kernels/README.md). torch is not imported yet.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self._name = name
        self._entry = entry
        self._failure: str | None = None
        self._loop: Worker | None = None
        self._rank_server: RankServer | None = None
        self._server: grpc.aio.Server | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return self._name

    async def start(self, spec: RankSpec, place: RankPlace) -> RankEntry:
        """Joins the group, loads the model, opens the server. Collective: every rank of the group starts at once."""
        from moestro.workers.device import freeze_heap
        from moestro.workers.full_group import GroupPlace, build_rank

        host = "127.0.0.1" if place.on_loopback else ray.util.get_node_ip_address()
        group_place = GroupPlace(place.rank, place.epoch, place.store, host)
        built = await asyncio.to_thread(build_rank, spec, group_place, self._progress)
        self._loop = built.loop
        events = asyncio.get_running_loop()
        address = ""
        if self._entry.tp_rank == 0:
            self._rank_server = RankServer(
                built.loop.submit,
                built.limits,
                built.load,
                place.secret,
                place.epoch,
                experts=built.loop.experts,
                request_placement=built.loop.request_placement,
            )
            self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
            rank_pb2_grpc.add_RankServiceServicer_to_server(self._rank_server, self._server)
            port = self._server.add_insecure_port(f"{host}:0")
            await self._server.start()
            address = f"{host}:{port}"
        publish = _publisher(events, self._rank_server)
        await asyncio.to_thread(freeze_heap)
        self._thread = threading.Thread(target=self._run, args=(publish, events), name="engine", daemon=True)
        self._thread.start()
        self._entry = replace(self._entry, state=RankState.SERVING, address=address, device=built.device)
        log.info("%s serves at %s", self._name, address or "its leader")
        return self._entry

    async def entry(self) -> RankEntry:
        """How far this rank is. Raises when its engine has died, which is how its group learns of it."""
        if self._failure is not None:
            raise RuntimeError(f"{self._name}: {self._failure}")
        return replace(self._entry, resident_bytes=psutil.Process().memory_info().rss)

    async def drain(self, seconds: float) -> None:
        """Waits until nothing runs here, or the time is up."""
        if self._rank_server is not None:
            await self._rank_server.drained(seconds)

    async def stop(self) -> None:
        """Ends the engine of the whole group, then this rank's server."""
        if self._loop is not None:
            self._loop.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_S)
        if self._server is not None:
            await self._server.stop(0.2)

    def _run(self, publish: Callable[[StepOutput], None], events: asyncio.AbstractEventLoop) -> None:
        assert self._loop is not None
        try:
            self._loop.run(publish)
        except Exception as error:
            log.exception("%s: the engine died", self._name)
            self._failure = f"{type(error).__name__}: {error}"
            if self._rank_server is not None:
                events.call_soon_threadsafe(self._rank_server.fail, "its engine died")

    def _progress(self, progress: Progress) -> None:
        self._entry = replace(self._entry, loaded_bytes=progress.bytes_done, total_bytes=progress.bytes_total)


def _publisher(events: asyncio.AbstractEventLoop, server: RankServer | None) -> Callable[[StepOutput], None]:
    """Takes results from the engine's thread to the server's loop. A tensor-parallel peer says nothing: its leader
    says the same."""

    def publish(output: StepOutput) -> None:
        if server is not None:
            events.call_soon_threadsafe(server.publish, output.deltas, output.refusals, output.load)

    return publish
