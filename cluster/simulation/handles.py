"""Calls of methods in another process: in place of Ray's handles of actors and deployments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from moestro.cluster.simulation.network import Network
from moestro.cluster.simulation.virtual_time import CURRENT, Process

LOSS_S = 0.05  # until a caller hears that the other process has died


class ProcessDied(ConnectionError):
    """What Ray says of an actor that is gone."""


@dataclass(frozen=True, slots=True)
class Host:
    """An object and the process it lives in."""

    process: Process
    target: object


class Handle:
    """``await handle.method(...)``. ``find`` says who answers just now."""

    def __init__(self, network: Network, find: Callable[[], Host | None]) -> None:
        self._network, self._find = network, find

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self._network, self._find, name)


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a handle."""

    network: Network
    find: Callable[[], Host | None]
    name: str

    def __call__(self, *args: Any, **options: Any) -> Awaitable[Any]:
        """The answer, later. Raises what the method raises, or ProcessDied."""
        caller = CURRENT.get()
        assert caller is not None, "a call from outside any process"
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        host = self.find()
        if host is None or not host.process.is_alive:
            _later(answer, ProcessDied(f"nobody answers {self.name}"))
            return answer
        process, target = host.process, host.target
        forget = process.at_death(lambda: _later(answer, ProcessDied(f"{process.name} died")))
        answer.add_done_callback(lambda _: forget())
        there, back = self.network.pipe(caller, process), self.network.pipe(process, caller)

        async def work() -> None:
            try:
                result = await getattr(target, self.name)(*args, **options)
            except Exception as error:
                failure = error
                back.send(lambda: _fail(answer, failure))
            else:
                back.send(lambda: _settle(answer, result))

        there.send(lambda: _spawn(process, work))
        return answer


def _spawn(process: Process, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    process.spawn(work())


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


def _later(answer: asyncio.Future[Any], error: Exception) -> None:
    asyncio.get_running_loop().call_later(LOSS_S, _fail, answer, error)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # nobody may be waiting any more
