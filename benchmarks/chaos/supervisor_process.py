"""The supervisor of a cluster without Ray, in a process of its own: it carries out the membership of every group with
plain processes, and keeps the gateways running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from benchmarks.chaos import gateway_process, rank_process
from benchmarks.chaos.lines import LONGEST, Line, Message, decode_state, encode_group, encode_view
from benchmarks.chaos.network import Host

from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Form, GiveUp, Intent, Kill, MembershipConfig, Start
from moestro.router.mesh import serve_store
from moestro.router.parallel import GroupShape
from moestro.workers.worker_state import WorkerPhase

TICK_S = 0.1
AGAIN_S = 0.5  # before a gateway that was killed is started again
PRELOADED = [
    "benchmarks.chaos.rank_process",
    "benchmarks.chaos.gateway_process",
    "moestro.cluster.gateway",
    "moestro.cluster.ranks.server",
    "moestro.cluster.serving.rank_spec",
    "moestro.workers.worker",
]


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor is to keep running. Plain values: it comes as JSON."""

    config: dict[str, Any]
    secret: str
    listen: str  # address that ranks can reach
    hosts: list[list[str]]  # name and address of each host that ranks are spread over; none: all on this machine
    told: str  # file in which the processes are told


@dataclass
class Process:
    """One process that was started. ``pid`` is found when it is first asked for: one that is inside another host is
    started by others."""

    wait: Callable[[], Any]  # blocks until it has ended
    started: int
    line: Line | None = None
    address: str = ""
    device: str = ""
    fault: str = ""

    @property
    def pid(self) -> int:
        """Of the process itself, below the commands that put it on its host."""
        found = psutil.Process(self.started)
        while any(name in found.name() for name in ("ip", "unshare")):
            found = found.children()[0]
        return found.pid

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error, IndexError):
            os.kill(self.pid, signal.SIGKILL)


class Launcher:
    """Starts processes: forked from one that has imported all there is, or anew on another host."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def fork(self, main: Callable[..., None], *arguments: Any) -> Process:
        process = self._context.Process(target=main, args=arguments)
        process.start()
        assert process.pid is not None
        return Process(process.join, process.pid)

    def on_host(self, host: Host, place: rank_process.Place) -> Process:
        command = [sys.executable, "-m", "benchmarks.chaos.rank_process", rank_process.arguments(place)]
        process = subprocess.Popen(host.inside(command), stdin=subprocess.DEVNULL)
        return Process(process.wait, process.pid)


@dataclass
class Group:
    """One group: its membership and the processes that make it up."""

    name: str
    membership: Membership
    shape: GroupShape
    orders: Orders
    launcher: Launcher
    port: int  # of the supervisor
    store: tuple[str, int]
    hosts: Sequence[Host]
    changed: Callable[[], None]
    workers: dict[int, Process] = field(default_factory=dict)

    def carry_out(self, intents: Sequence[Intent]) -> None:
        for intent in intents:
            match intent:
                case Start(seat, worker):
                    self._start(seat, worker)
                case Form(view):
                    for member in view.members:
                        if (process := self.workers.get(member.worker)) and process.line:
                            process.line.send({"form": encode_view(view)})
                case Kill(worker, reason):
                    if worker in self.workers:
                        self.workers[worker].fault = reason
                        self.workers[worker].kill()
                case GiveUp(reason):
                    print(f"{self.name} gives up: {reason}", file=sys.stderr, flush=True)
        if intents:
            self.changed()

    def hear(self, worker: int, message: Message) -> None:
        process = self.workers[worker]
        process.address, process.device = message.get("address", process.address), message.get("device", process.device)
        before = self.entry()
        self.carry_out(self.membership.told(worker, decode_state(message["state"]), now()))
        if self.entry() != before:
            self.changed()

    def pulse(self) -> None:
        for process in self.workers.values():
            if process.line is not None:
                process.line.send({"pulse": True})
        self.carry_out(self.membership.tick(now()))

    def entry(self) -> GroupEntry:
        ranks = tuple(self._rank(seat) for seat in range(self.shape.world_size))
        epoch = self.membership.view.epoch if self.membership.view is not None else 0
        return GroupEntry(self.name, self.shape.dp, self.shape.tp, epoch, ranks)

    def _rank(self, seat: int) -> RankEntry:
        entry = RankEntry(seat // self.shape.tp, seat % self.shape.tp)
        tracked = self.membership.worker_at(seat)
        if tracked is None or tracked.number not in self.workers:
            return replace(entry, state=RankState.LOST)
        process = self.workers[tracked.number]
        # A member of the view goes on serving its streams while the view forms.
        serves = tracked.state.phase in (WorkerPhase.SERVING, WorkerPhase.BROKEN) or (
            tracked.state.phase is WorkerPhase.JOINING and tracked.has_served
        )
        state = RankState.SERVING if serves else RankState.STARTING
        return replace(entry, state=state, address=process.address, device=process.device)

    def _start(self, seat: int, worker: int) -> None:
        host = self.hosts[seat % len(self.hosts)] if self.hosts else None
        place = rank_process.Place(
            config=self.orders.config,
            group=self.name,
            seat=seat,
            worker=worker,
            host=host.address if host else "127.0.0.1",
            store=self.store,
            supervisor=(self.orders.listen, self.port),
            secret=self.orders.secret,
        )
        process = self.launcher.on_host(host, place) if host else self.launcher.fork(rank_process.main, place)
        self.workers[worker] = process
        asyncio.create_task(self._watch(worker, process))  # noqa: RUF006 - ends with the process

    async def _watch(self, worker: int, process: Process) -> None:
        await asyncio.to_thread(process.wait)
        self.workers.pop(worker, None)
        self.carry_out(self.membership.died(worker, process.fault or "its process has ended", now()))
        self.changed()


def now() -> float:
    return asyncio.get_running_loop().time()


class Supervisor:
    """All of it."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._config = Config.model_validate(orders.config)
        self._launcher = Launcher()
        self._groups: dict[str, Group] = {}
        self._gateways: dict[str, Process] = {}
        self._stores: list[Any] = []  # served while referenced
        self._port = 0

    async def run(self) -> None:
        server = await asyncio.start_server(self._accept, self._orders.listen, 0, limit=LONGEST)
        self._port = server.sockets[0].getsockname()[1]
        cluster, recovery = self._config.cluster, self._config.recovery
        shape = GroupShape(cluster.dp, cluster.tp)
        hosts = [Host(name, address) for name, address in self._orders.hosts]
        for number in range(cluster.groups):
            store, address = serve_store(self._orders.listen)
            self._stores.append(store)
            membership = Membership(MembershipConfig(shape, min_ranks=recovery.min_ranks), 1)
            name = f"group-{number}"
            group = Group(name, membership, shape, self._orders, self._launcher, self._port,
                          (address.host, address.port), hosts, self._changed)  # fmt: skip
            self._groups[name] = group
            group.carry_out(membership.begin(now()))
        for number in range(cluster.gateways):
            asyncio.create_task(self._keep_gateway(number))  # noqa: RUF006 - for as long as we live
        while True:
            await asyncio.sleep(TICK_S)
            for group in self._groups.values():
                group.pulse()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        messages = line.messages()
        hello = await anext(messages, None)
        if hello is None:
            return
        if "gateway" in hello:
            self._gateways[hello["gateway"]].line = line
            self._changed()
            async for _ in messages:
                pass
            return
        group = self._groups[hello["group"]]
        if (process := group.workers.get(hello["worker"])) is None:
            return line.close()
        process.line = line
        self._changed()
        async for message in messages:
            if hello["worker"] in group.workers:
                group.hear(hello["worker"], message)
        return None

    async def _keep_gateway(self, number: int) -> None:
        """Starts it again whenever it has ended."""
        for attempt in range(10**9):
            name = f"gateway-{number}.{attempt}"
            process = self._launcher.fork(
                gateway_process.main,
                self._orders.config,
                name,
                self._orders.secret,
                (self._orders.listen, self._port),
            )
            self._gateways[name] = process
            await asyncio.to_thread(process.wait)
            del self._gateways[name]
            self._changed()
            await asyncio.sleep(AGAIN_S)

    def _changed(self) -> None:
        """Tells the gateways and whoever looks for somebody to hurt."""
        message = {"groups": [encode_group(group.entry()) for group in self._groups.values()]}
        for gateway in self._gateways.values():
            if gateway.line is not None:
                gateway.line.send(message)
        ranks = []
        for group in self._groups.values():
            for worker, process in group.workers.items():
                tracked = next((each for each in group.membership.members() if each.number == worker), None)
                if tracked is not None and not process.fault:
                    with contextlib.suppress(psutil.Error, IndexError):
                        ranks.append([f"{group.name} rank {tracked.seat} (worker {worker})", process.pid])
        gateways = [[name, process.started] for name, process in self._gateways.items() if process.line is not None]
        told = Path(self._orders.told)
        draft = told.with_suffix(".draft")
        draft.write_text(json.dumps({"rank": ranks, "gateway": gateways}))
        draft.replace(told)


def main(orders: Orders) -> None:
    asyncio.run(Supervisor(orders).run())


if __name__ == "__main__":
    main(Orders(**json.loads(sys.argv[1])))
