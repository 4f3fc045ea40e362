"""A rank as a Ray actor: an engine thread, and the server that gateways attach to."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc
import psutil
import ray

from moestro.cluster.directory import RankEntry, RankState
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos.gen import rank_pb2_grpc
from moestro.workers.rank_loop import RankLoop, StepOutput
from moestro.workers.rank_setup import Address, RankSpec, build_rank

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one rank stands: its group, its number there, and how the group's members find each other."""

    group: str
    rank: int
    epoch: int
    store: Address
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
        self._num_busy = 0

    def __repr__(self) -> str:
        return f"{self._place.group} rank {self._place.rank}"

    async def start(self) -> RankEntry:
        """Joins the group, loads the model, opens the server. Collective: every rank of the group starts at once."""
        built = await asyncio.to_thread(
            build_rank, self._spec, self._place.rank, self._place.store, self._place.epoch, self._progress
        )
        self._loop = built.loop
        address = ""
        publish: Callable[[StepOutput], None] = self._ignore
        if self._spec.shape.tp_rank(self._place.rank) == 0:
            events = asyncio.get_running_loop()
            rank_server = RankServer(built.loop.submit, built.limits, self._place.secret, self._place.epoch)
            self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
            rank_pb2_grpc.add_RankServiceServicer_to_server(rank_server, self._server)
            host = "127.0.0.1" if self._place.on_loopback else ray.util.get_node_ip_address()
            port = self._server.add_insecure_port(f"{host}:0")
            await self._server.start()
            address = f"{host}:{port}"

            def publish(output: StepOutput) -> None:
                self._num_busy = output.load.num_running + output.load.num_waiting
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
        until = time.monotonic() + seconds
        while self._num_busy and time.monotonic() < until:
            await asyncio.sleep(0.05)

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

    def _progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self._entry = replace(self._entry, loaded_bytes=loaded_bytes, total_bytes=total_bytes)

    @staticmethod
    def _ignore(output: StepOutput) -> None:
        """A tensor-parallel peer says nothing: its leader says the same."""
