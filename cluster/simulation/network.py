"""What lies between simulated processes: pipes that deliver in order, late, or not at all.

A pipe is one direction of a TCP connection. What is sent arrives once, in order, after a random delay; pipes know
nothing of each other, so messages of different ones overtake. A process that is killed sends and hears no more, but
what it had sent arrives. What a stopped process is sent waits until it goes on, and so does what is sent across a
partition, until that heals.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import CURRENT, Process

_APART_S = 1e-7  # between two deliveries of one pipe: a heap of timers does not keep the order of equal times


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds that a message is under way: nearly always ``usual_s``, now and then up to ``tail_s``."""

    usual_s: float = 0.0005
    tail_s: float = 0.05
    tail_share: float = 0.02


class Network:
    """All pipes of a simulation, and what is wrong with them."""

    def __init__(self, rng: random.Random, trace: Trace, delays: Delays | None = None) -> None:
        self.trace = trace
        self._rng = rng
        self._delays = delays or Delays()
        self._pipes: dict[Pipe, None] = {}
        self._stopped: set[str] = set()
        self._parted: set[frozenset[str]] = set()

    def pipe(self, sender: Process, receiver: Process) -> Pipe:
        return Pipe(self, sender, receiver)

    def delay_s(self) -> float:
        """Of one message."""
        tail = self._rng.random() < self._delays.tail_share
        return self._rng.uniform(0.0, self._delays.tail_s if tail else self._delays.usual_s)

    def stop(self, process: Process) -> None:
        """As SIGSTOP: it hears nothing until it goes on."""
        self._stopped.add(process.name)

    def resume(self, process: Process) -> None:
        """As SIGCONT."""
        self._stopped.discard(process.name)
        self._flush()

    def part(self, one: Process, other: Process) -> None:
        """Nothing passes between two processes until it heals."""
        self._parted.add(frozenset((one.name, other.name)))

    def heal(self, one: Process, other: Process) -> None:
        self._parted.discard(frozenset((one.name, other.name)))
        self._flush()

    def is_stopped(self, process: Process) -> bool:
        return process.name in self._stopped

    def passes(self, sender: Process, receiver: Process) -> bool:
        """Whether something that is sent now can arrive."""
        return receiver.name not in self._stopped and not self.parted(sender, receiver)

    def parted(self, one: Process, other: Process) -> bool:
        return bool(self._parted) and frozenset((one.name, other.name)) in self._parted

    def hold(self, pipe: Pipe) -> None:
        """A pipe has something that cannot arrive now."""
        self._pipes[pipe] = None

    def _flush(self) -> None:
        for pipe in tuple(self._pipes):
            if self.passes(pipe.sender, pipe.receiver):
                del self._pipes[pipe]
                pipe.flush()


class Pipe:
    """One direction of one connection."""

    def __init__(self, network: Network, sender: Process, receiver: Process) -> None:
        self.sender, self.receiver = sender, receiver
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._last_s = 0.0
        self._held: list[Callable[[], None]] = []
        self._is_open = True

    def send(self, deliver: Callable[[], None], after_s: float = 0.0) -> None:
        """``deliver`` is called in the receiver's name when it arrives. A dead sender sends nothing."""
        if not (self.sender.is_alive and self._is_open):
            return
        self._last_s = max(self._loop.time() + after_s + self._network.delay_s(), self._last_s + _APART_S)
        self._loop.call_at(self._last_s, self._arrive, deliver)

    def close(self) -> None:
        """What is under way does not arrive, and nothing that is sent later."""
        self._is_open = False
        self._held.clear()

    def flush(self) -> None:
        held, self._held = self._held, []
        for deliver in held:
            self._arrive(deliver)

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if not (self._is_open and self.receiver.is_alive):
            return
        if self._held or not self._network.passes(self.sender, self.receiver):
            self._held.append(deliver)
            self._network.hold(self)
            return
        token = CURRENT.set(self.receiver)
        try:
            deliver()
        finally:
            CURRENT.reset(token)
