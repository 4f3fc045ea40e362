"""A rank as a Ray actor: an engine thread, and the server that gateways attach to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
import psutil
import ray

from moestro.cluster.directory import RankEntry, RankState
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLoad
from moestro.router.mesh import StoreAddress
from moestro.workers.loading import Progress
from moestro.workers.rank_loop import RankLoop, StepOutput
from moestro.workers.rank_setup import GroupPlace, RankSpec, build_rank

log = logging.getLogger(__name__)


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

    def __init__(self, spec: RankSpec, place: RankPlace) -> None:
        self._spec = spec
        self._place = place
        self._entry = RankEntry(spec.shape.dp_rank(place.rank), spec.shape.tp_rank(place.rank))
        self._failure: str | None = None
        self._loop: RankLoop | None = None
        self._server: grpc.aio.Server | None = None
        self._thread: threading.Thread | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"{self._place.group} rank {self._place.rank}"

    async def start(self) -> RankEntry:
        """Joins the group, loads the model, opens the server. Collective: every rank of the group starts at once."""
        built = await asyncio.to_thread(build_rank, self._spec, self._group_place(), self._progress)
        self._loop = built.loop
        address = ""
        publish: Callable[[StepOutput], None] = self._ignore
        if self._spec.shape.tp_rank(self._place.rank) == 0:
            events = asyncio.get_running_loop()
            rank_server = RankServer(built.loop.submit, built.limits, self._place.secret, self._place.epoch)
            self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
            rank_pb2_grpc.add_RankServiceServicer_to_server(rank_server, self._server)
            port = self._server.add_insecure_port(f"{self._host()}:0")
            await self._server.start()
            address = f"{self._host()}:{port}"

            def publish(output: StepOutput) -> None:
                events.call_soon_threadsafe(self._note, output.load)
                events.call_soon_threadsafe(rank_server.publish, output.deltas, output.refusals, output.load)

        self._thread = threading.Thread(target=self._run, args=(publish,), name="engine", daemon=True)
        self._thread.start()
        self._entry = replace(
            self._entry,
            state=RankState.SERVING,
            address=address,
            device=built.device,
            resident_bytes=psutil.Process().memory_info().rss,
        )
        return self._entry

    async def entry(self) -> RankEntry:
        """How far this rank is. Raises when its engine has died, which is how its group learns of it."""
        if self._failure is not None:
            raise RuntimeError(f"{self!r}: {self._failure}")
        return replace(self._entry, resident_bytes=psutil.Process().memory_info().rss)

    async def drain(self, seconds: float) -> None:
        """Waits until nothing runs here, or the time is up."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def stop(self) -> None:
        """Ends the engine of the whole group, then this rank's server."""
        if self._loop is not None:
            self._loop.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5.0)
        if self._server is not None:
            await self._server.stop(0.2)

    def _run(self, publish: Callable[[StepOutput], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.run(publish)
        except Exception as error:
            log.exception("%r: the engine died", self)
            self._failure = f"{type(error).__name__}: {error}"

    def _group_place(self) -> GroupPlace:
        return GroupPlace(self._place.rank, self._place.epoch, self._place.store, self._host())

    def _host(self) -> str:
        return "127.0.0.1" if self._place.on_loopback else ray.util.get_node_ip_address()

    def _progress(self, progress: Progress) -> None:
        self._entry = replace(self._entry, loaded_bytes=progress.bytes_done, total_bytes=progress.bytes_total)

    def _note(self, load: EngineLoad) -> None:
        if load.num_running or load.num_waiting:
            self._idle.clear()
        else:
            self._idle.set()

    @staticmethod
    def _ignore(output: StepOutput) -> None:
        """A tensor-parallel peer says nothing: its leader says the same."""
