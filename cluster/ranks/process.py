"""A rank's process, whatever has started it: a worker on a thread of its own, and the server that gateways attach to.

All methods on the process's asyncio loop. Imports torch only in the thread that loads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import psutil

from moestro.cluster.heap import freeze_heap
from moestro.cluster.memory_reader import MemoryReader
from moestro.cluster.memory_watch import watch_memory
from moestro.cluster.ranks.priority import gentle
from moestro.cluster.ranks.report import UNHEARD, WATCH_S, RankPlace, RankReport
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos.gen import rank_pb2_grpc
from moestro.router.view import View
from moestro.workers.worker_state import WorkerPhase, WorkerState

if TYPE_CHECKING:
    from moestro.workers.loading import Progress
    from moestro.workers.rank_loop import StepOutput
    from moestro.workers.rank_setup import RankSpec
    from moestro.workers.worker import LoadedWorker, Worker

log = logging.getLogger(__name__)

JOIN_S = 5.0  # an engine in the middle of a step ends at the head of the next
STOP_S = 0.2


class RankProcess:
    """``start`` returns at once; ``watch`` tells how far it is."""

    def __init__(self, spec: RankSpec, place: RankPlace) -> None:
        self._spec, self._place = spec, place
        self._report = UNHEARD
        self._changed = asyncio.Event()
        self._worker: Worker | None = None
        self._rank_server: RankServer | None = None
        self._server: grpc.aio.Server | None = None
        self._engine: threading.Thread | None = None
        self._starting: asyncio.Task[None] | None = None
        self._memory: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to load."""
        self._starting = asyncio.create_task(self._start())

    async def watch(self, version: int) -> RankReport:
        """Answers when there is another version than ``version``, or after WATCH_S."""
        if version == self._report.version:
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), WATCH_S)
            except TimeoutError:
                self._refresh()
        return self._report

    async def form(self, view: View) -> None:
        """Has the worker go over to a view; returns at once."""
        if self._worker is not None:
            self._worker.form(view)

    async def holdings(self) -> tuple[tuple[int, ...], ...]:
        """By mixture layer the logical experts held here."""
        return () if self._worker is None else await asyncio.to_thread(self._worker.holdings)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new. Returns when nothing runs here; after ``seconds`` what does is told to go elsewhere."""
        if self._rank_server is not None:
            await self._rank_server.drain(seconds)

    async def stop(self) -> None:
        """Ends the engine of the whole group, then this rank's server."""
        if self._worker is not None:
            self._worker.stop()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.join, JOIN_S)
        if self._server is not None:
            await self._server.stop(STOP_S)
        if self._memory is not None:
            self._memory.cancel()

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        loading = loop.create_future()
        threading.Thread(target=self._load, args=(loop, loading), name="loading", daemon=True).start()
        try:
            loaded: LoadedWorker = await loading
            address = await self._open(loaded) if self._place.leads else ""
        except Exception as error:
            log.exception("%s cannot start", self._place.name)
            reason = f"{type(error).__name__}: {error}"
            self._tell(state=WorkerState(WorkerPhase.FAILED, reason=reason))
            return
        self._engine = threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True)
        self._engine.start()
        log.info("%s is ready at %s", self._place.name, address or "its leader's")
        self._tell(address=address, device=loaded.device)
        self._refresh()

    def _load(self, loop: asyncio.AbstractEventLoop, loading: asyncio.Future[LoadedWorker]) -> None:
        """In a thread that ends with it, and its priority with the thread."""
        place = self._place
        if place.gently:
            gentle()
        try:
            from moestro.router.native import build as boards
            from moestro.workers.worker import Worker

            def on_state(_: WorkerState) -> None:
                loop.call_soon_threadsafe(self._refresh)

            def on_progress(progress: Progress) -> None:
                loop.call_soon_threadsafe(self._loaded, progress)

            worker = Worker(
                self._spec,
                place.store,
                place.seat,
                place.worker,
                hostname=place.host,
                on_state=on_state,
                on_progress=on_progress,
            )
            loaded = worker.load(place.held)
            boards.prepare()  # a first start compiles them; the forming of a view does not wait for that
            freeze_heap()
        except Exception as error:
            loop.call_soon_threadsafe(loading.set_exception, error)
            return
        self._worker = worker
        loop.call_soon_threadsafe(loading.set_result, loaded)

    async def _open(self, loaded: LoadedWorker) -> str:
        """Starts the server; returns its address."""
        assert self._worker is not None
        self._rank_server = RankServer(
            self._worker.submit,
            loaded.limits,
            loaded.load,
            self._place.secret,
            experts=self._worker.experts,
            request_placement=self._worker.request_placement,
            on_over=self._over,
        )
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        rank_pb2_grpc.add_RankServiceServicer_to_server(self._rank_server, self._server)
        port = self._server.add_insecure_port(f"{self._place.host}:0")
        await self._server.start()
        limit = self._spec.memory_bytes if loaded.device == "cpu" else 0  # a GPU's memory is fixed when it starts
        self._memory = asyncio.create_task(watch_memory(MemoryReader(limit), self._rank_server.set_pressure))
        return f"{self._place.host}:{port}"

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The engine's thread. A tensor-parallel peer publishes nothing: its leader says the same."""
        assert self._worker is not None
        server = self._rank_server

        def publish(output: StepOutput) -> None:
            if server is not None:
                loop.call_soon_threadsafe(server.publish, output.deltas, output.refusals, output.load, output.lost)

        try:
            self._worker.run(publish)
        except Exception:
            log.exception("%s: the engine died", self._place.name)
            if server is not None:
                loop.call_soon_threadsafe(server.fail, "its engine died")

    def _over(self, epoch: int) -> None:
        """The group serves in a newer epoch without this process, which was given up for lost: it is of no use."""
        log.error("%s: epoch %d is served without this process", self._place.name, epoch)
        os._exit(1)

    def _loaded(self, progress: Progress) -> None:
        """Not worth waking a watch for."""
        self._report = replace(self._report, loaded_bytes=progress.bytes_done, total_bytes=progress.bytes_total)

    def _refresh(self) -> None:
        """Takes in how the worker is. It counts as loading until gateways can attach, too."""
        resident = psutil.Process().memory_info().rss
        if self._worker is None or self._engine is None:
            self._tell(resident_bytes=resident)
            return
        state = self._worker.state
        age = None if state.in_step_since_s is None else max(0.0, time.monotonic() - state.in_step_since_s)
        if self._rank_server is not None and state.phase is WorkerPhase.SERVING:
            self._rank_server.epoch = state.epoch
        self._tell(state=state, step_age_s=age, resident_bytes=resident)

    def _tell(self, **news: object) -> None:
        self._report = replace(self._report, version=self._report.version + 1, **news)  # type: ignore[arg-type]
        self._changed.set()
        self._changed = asyncio.Event()
