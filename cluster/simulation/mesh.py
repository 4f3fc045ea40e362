"""The collectives of one epoch, as one member has them: gather, and sleep until somebody wakes the group.

What a member says reaches every other on a pipe of its own, so a death in the middle of a collective lets some members
complete it and not others, as it does with gloo and with boards.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from moestro.cluster.simulation.network import Network, Pipe
from moestro.cluster.simulation.virtual_time import Process
from moestro.router.view import View

LOSS_S = 0.03  # until a member's death is noticed by its peers (measured with gloo); boards look every 50 ms


class EpochBroken(RuntimeError):
    """The collectives of this epoch no longer work."""


class Fabric:
    """Where the members of one group find each other: in place of the store and the sockets of its workers."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.processes: dict[int, Process] = {}  # by worker
        self._ports: dict[tuple[int, int], Mesh] = {}  # (epoch, worker)
        self._pipes: dict[tuple[int, int, int], Pipe] = {}

    def port(self, epoch: int, worker: int) -> Mesh:
        """A member's end; messages may come to it before its owner does."""
        return self._ports.setdefault((epoch, worker), Mesh(self, epoch, worker))

    def pipe(self, epoch: int, sender: int, receiver: int) -> Pipe:
        key = (epoch, sender, receiver)
        if key not in self._pipes:
            self._pipes[key] = self.network.pipe(self.processes[sender], self.processes[receiver])
        return self._pipes[key]

    def lose(self, worker: int) -> None:
        """A worker's process has died: its connections break, each peer notices in its own time."""
        loop = asyncio.get_running_loop()
        for (_, other), mesh in tuple(self._ports.items()):
            if other != worker:
                delay_s = LOSS_S + self.network.delay_s()
                loop.call_later(delay_s, mesh.lose, worker, f"connection to worker {worker} lost")


class Mesh:
    """One member's end of one epoch."""

    def __init__(self, fabric: Fabric, epoch: int, worker: int) -> None:
        self.epoch = epoch
        self.broken = ""
        self.progress = 0
        self._fabric = fabric
        self._worker = worker
        self._view: View | None = None
        self._said: defaultdict[tuple[object, int], dict[int, Any]] = defaultdict(dict)  # (who gathers, n) -> by worker
        self._counts: defaultdict[object, int] = defaultdict(int)
        self._woken: set[int] = set()
        self._lost: dict[int, str] = {}
        self._sleeps = 0
        self._changed = asyncio.Event()

    def join(self, view: View) -> None:
        """The owner has come."""
        self._view = view
        for worker, reason in self._lost.items():
            self.lose(worker, reason)

    @property
    def members(self) -> tuple[int, ...]:
        assert self._view is not None
        return tuple(member.worker for member in self._view.members)

    async def gather(self, value: Any, timeout_s: float, among: tuple[int, ...] | None = None) -> list[Any]:
        """By rank: what every member, or every one ``among`` some, says. Raises EpochBroken."""
        workers = among or self.members
        number = self._counts[workers]
        self._counts[workers] += 1
        said = self._said[workers, number]
        said[self._worker] = value
        for worker in workers:
            if worker != self._worker:
                self._send(worker, lambda port: port.hear(workers, number, self._worker, value))
        await self._until(lambda: len(said) == len(workers), timeout_s)
        del self._said[workers, number]
        self.progress += 1
        return [said[worker] for worker in workers]

    async def sleep(self) -> None:
        """Until some member wakes the group for the n-th time. Raises EpochBroken."""
        number = self._sleeps
        await self._until(lambda: number in self._woken, None)
        self._sleeps += 1

    def wake(self) -> None:
        """Ends the sleep of all members, or the next one."""
        number = self._sleeps
        if number not in self._woken:
            self._woken.add(number)
            self._changed.set()
            if self._view is not None:
                for worker in self.members:
                    if worker != self._worker:
                        self._send(worker, lambda port: port.hear_wake(number))

    def abort(self, reason: str) -> None:
        """The owner leaves: its peers see its connections break."""
        if not self.broken:
            self._break(reason)
            for worker in self.members if self._view is not None else ():
                if worker != self._worker:
                    self._send(worker, lambda port: port.lose(self._worker, f"worker {self._worker} left"))

    def hear(self, workers: tuple[int, ...], number: int, worker: int, value: Any) -> None:
        self._said[workers, number][worker] = value
        self._changed.set()

    def hear_wake(self, number: int) -> None:
        self._woken.add(number)
        self._changed.set()

    def lose(self, worker: int, reason: str) -> None:
        """A peer is gone."""
        if self._view is None:
            self._lost[worker] = reason
        elif worker in self.members:
            self._break(reason)

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason
        self._changed.set()

    def _send(self, worker: int, say: Callable[[Mesh], None]) -> None:
        pipe = self._fabric.pipe(self.epoch, self._worker, worker)
        pipe.send(lambda: say(self._fabric.port(self.epoch, worker)))

    async def _until(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not done():
                    if self.broken:
                        raise EpochBroken(self.broken)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self.abort(f"nobody came within {timeout_s} s")
            raise EpochBroken(self.broken) from None
