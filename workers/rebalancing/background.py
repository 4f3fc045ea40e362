"""Work beside serving, the same on every rank of a group, and known to all when all have done it.

Tasks are numbered from 1 in the order in which they are begun, which is the same on every rank since all begin the same
ones at the same steps. A rank says at the head of each step up to which number it is done; what all have done may be
used by all in that step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The task is not wanted any more."""


class Background:
    """One thread that does one task at a time. ``begin``, ``cancel`` and ``take`` belong to the engine's thread.

    ``notify`` is called, on the background thread, whenever a task has ended: a group that sleeps must wake to hear it.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._number = 0
        self._done = 0
        self._failed = 0
        self._failure = ""
        self._result: Any = None
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> int:
        return self._done

    @property
    def failed(self) -> int:
        return self._failed

    @property
    def failure(self) -> str:
        """What went wrong with the last task that failed here."""
        return self._failure

    def begin(self, work: Callable[[threading.Event], Any]) -> int:
        """Starts a task; one that still runs is cancelled and waited for by the new one. ``work`` is given an event
        that is set when the task should give up, by raising Cancelled. Returns the task's number."""
        self.cancel()
        self._number += 1
        self._cancelled = threading.Event()
        arguments = (self._number, work, self._cancelled, self._thread)
        self._thread = threading.Thread(target=self._run, args=arguments, name="rebalancing", daemon=True)
        self._thread.start()
        return self._number

    def cancel(self) -> None:
        """Asks the running task to give up. Nobody hears of it again."""
        self._cancelled.set()

    def take(self) -> Any:
        """The result of the last task, once it is done."""
        result, self._result = self._result, None
        return result

    def _run(
        self,
        number: int,
        work: Callable[[threading.Event], Any],
        cancelled: threading.Event,
        before: threading.Thread | None,
    ) -> None:
        if before is not None:
            before.join()
        try:
            result = work(cancelled)
        except Cancelled:
            return
        except Exception as error:
            log.exception("background task %d failed", number)
            self._failure, self._failed = f"{type(error).__name__}: {error}", number
        else:
            self._result, self._done = result, number
        self._notify()
