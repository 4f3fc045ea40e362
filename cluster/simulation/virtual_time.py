"""An asyncio loop whose clock jumps to the next timer: a simulated minute takes as long as what happens in it.

One thread, no sleeping. With all randomness from one seed a run is a function of that seed.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingWillHappen(AssertionError):
    """Everything waits and no timer is set: the simulated system is stuck for ever."""


class JumpingSelector(selectors.DefaultSelector):
    """Never waits: adds what it was asked to wait to the loop's clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingWillHappen("everything waits for something that can never happen")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0 s."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._jumping.now_s


class Process:
    """What dies together. Every task and timer that is made while one of its tasks runs belongs to it."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        """``on_failure`` hears what a spawned task raises while the process lives."""
        self.name = name
        self._on_failure = on_failure
        self.is_alive = True
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._at_death: dict[Callable[[], None], None] = {}

    def at_death(self, tell: Callable[[], None]) -> Callable[[], None]:
        """``tell`` is called when it is killed. Returns what takes that back."""
        self._at_death[tell] = None
        return lambda: self._at_death.pop(tell, None) and None

    def spawn(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Starts a task of this process."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        task = asyncio.get_running_loop().create_task(work, name=name or None, context=context)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self.is_alive:
            self._on_failure(error)

    def own(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def kill(self) -> None:
        """As SIGKILL does: nothing of it has any effect from here on. Its tasks still unwind, but nobody hears them."""
        if not self.is_alive:
            return
        self.is_alive = False
        for tell in tuple(self._at_death):
            tell()
        for task in tuple(self._tasks):
            task.cancel()


CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def _owned_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:
    task = asyncio.Task(work, loop=loop, **options)
    context = options.get("context")
    process = CURRENT.get() if context is None else context.get(CURRENT)
    if process is not None:
        process.own(task)
        if not process.is_alive:
            task.cancel()
    return task


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time, with tasks owned by processes."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_task_factory(_owned_task)  # type: ignore[arg-type]
        return runner.run(work)
