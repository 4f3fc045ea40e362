"""A group's supervisor with plain processes under it."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from benchmarks.chaos.plain import rank
from benchmarks.chaos.plain.calls import LONGEST, Caller
from benchmarks.chaos.plain.network import Host
from benchmarks.chaos.plain.parts import Orders

from moestro.cluster.membership_records import MembershipConfig
from moestro.cluster.ranks.report import RankPlace, RankReport
from moestro.cluster.supervisor import Held, Supervisor, WorkerGone, WorkerHandle
from moestro.router.mesh import StoreAddress, serve_store
from moestro.router.parallel import GroupShape
from moestro.router.view import View

CHECK_S = 0.1
HEALED_S = 3.0  # after which one whose host was cut off is fenced, if it has not ended of itself
PRELOADED = ["benchmarks.chaos.plain.rank", "moestro.cluster.serving.rank_spec", "moestro.workers.worker"]


async def run_group(orders: Orders) -> None:
    """Until the group is over. Raises GroupFailed with the reason."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    cluster, recovery = orders.config.cluster, orders.config.recovery
    shape = GroupShape(cluster.dp, cluster.tp)
    entry = await _patiently(lambda: orders.directory.begin(cluster.dp, cluster.tp))
    store, address = serve_store(orders.here)
    launcher = Launcher(orders, entry.name, address)
    await launcher.listen()
    config = MembershipConfig(shape, min_ranks=recovery.min_ranks)
    supervisor = Supervisor(config, entry, orders.directory, launcher, drain_s=orders.config.server.drain_s)
    try:
        await supervisor.start()
        while True:
            supervisor.check()
            await asyncio.sleep(CHECK_S)
    finally:
        await supervisor.stop()
        del store


async def _patiently(call: Callable[[], Any]) -> Any:
    """The directory may not be there yet."""
    while True:
        try:
            return await call()
        except OSError:
            await asyncio.sleep(CHECK_S)


@dataclass(eq=False)
class Handle:
    """Implements ``WorkerHandle``: a process on this machine, perhaps on a host of its own."""

    calls: Caller
    pid: int
    ended: asyncio.Future[str]
    host: Host | None

    async def watch(self, version: int) -> RankReport:
        try:
            report: RankReport = await self.calls.watch(version)
        except ConnectionError:
            if self.host is None:
                raise WorkerGone("its process has ended") from None
            raise
        return report

    async def gone(self) -> str:
        return await asyncio.shield(self.ended)

    async def form(self, view: View) -> None:
        await self.calls.form(view)

    async def holdings(self) -> Held:
        held: Held = await self.calls.holdings()
        return held

    async def drain(self, seconds: float) -> None:
        await self.calls.drain(seconds)

    async def stop(self) -> None:
        await self.calls.stop()

    def kill(self) -> None:
        """A host that is cut off cannot be reached."""
        if self.host is not None and not self.host.is_up:
            asyncio.get_running_loop().call_later(HEALED_S, self.kill)
        else:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Launcher:
    """Starts ranks: forked from a process that has imported all there is, or anew on another host."""

    def __init__(self, orders: Orders, group: str, store: StoreAddress) -> None:
        self._orders, self._group, self._store = orders, group, store
        self._hosts = [Host(*each) for each in orders.hosts]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._arrivals: dict[int, asyncio.Future[Caller]] = {}
        self._told: dict[int, tuple[str, int, str]] = {}  # name, process and set of each rank
        self._port = 0

    async def listen(self) -> None:
        """Ranks call here when they come up."""
        server = await asyncio.start_server(self._accept, self._orders.here, 0, limit=LONGEST)
        self._port = server.sockets[0].getsockname()[1]

    async def __call__(self, seat: int, worker: int, held: Held | None, gently: bool) -> WorkerHandle:
        host = self._hosts[seat % len(self._hosts)] if self._hosts else None
        place = RankPlace(
            group=self._group,
            seat=seat,
            worker=worker,
            tp=self._orders.config.cluster.tp,
            store=self._store,
            host=host.address if host else "127.0.0.1",
            secret=self._orders.secret,
            held=held,
            gently=gently,
        )
        told = rank.orders_of(self._orders.config, place, (self._orders.here, self._port))
        loop = asyncio.get_running_loop()
        arrival = self._arrivals[worker] = loop.create_future()
        pid, wait = await asyncio.to_thread(self._on_host, host, told) if host else self._fork(told)
        ended: asyncio.Future[str] = loop.create_future()
        waiting = asyncio.create_task(self._wait(worker, wait, ended))
        try:
            done, _ = await asyncio.wait({arrival, waiting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            os.kill(pid, signal.SIGKILL)
            raise
        if arrival not in done:
            raise WorkerGone("its process ended before it could be reached")
        handle = Handle(arrival.result(), pid if host is None else _innermost(pid), ended, host)
        tensor_parallel_set = f"{self._group} {seat // self._orders.config.cluster.tp}"
        self._told[worker] = f"{self._group} rank {seat} (worker {worker})", handle.pid, tensor_parallel_set
        self._tell()
        return handle

    def _fork(self, told: str) -> tuple[int, Callable[[], Any]]:
        process = self._context.Process(target=rank.main, args=(told,))
        process.start()
        assert process.pid is not None
        return process.pid, process.join

    def _on_host(self, host: Host, told: str) -> tuple[int, Callable[[], Any]]:
        command = host.inside([sys.executable, "-m", "benchmarks.chaos.plain.rank", told])
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return process.pid, process.wait

    async def _wait(self, worker: int, wait: Callable[[], Any], ended: asyncio.Future[str]) -> None:
        code = await asyncio.to_thread(wait)
        self._told.pop(worker, None)
        self._tell()
        ended.set_result(f"its process has ended ({code})" if code else "its process has ended")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = json.loads(await reader.readline() or b"{}")
        if hello:
            self._arrivals.pop(hello["worker"]).set_result(Caller(reader, writer, WorkerHandle))

    def _tell(self) -> None:
        """Whoever looks for somebody to hurt reads this file."""
        file = Path(self._orders.folder, f"{self._orders.name}.json")
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(sorted(self._told.values())))
        draft.replace(file)


def _innermost(pid: int) -> int:
    """The process below the commands that put it on its host."""
    process = psutil.Process(pid)
    while process.name() in ("ip", "unshare"):
        (process,) = process.children()
    return process.pid
