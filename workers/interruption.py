"""Being called away from whatever is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from functools import partial
from typing import TypeVar

from moestro.workers.regroup import Superseded

Result = TypeVar("Result")


class Interruption:
    """Comes once, from any thread; ``event`` is then set."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()
        self._then: list[Callable[[], object]] = []

    def come(self) -> None:
        with self._lock:
            self.event.set()
            then, self._then = self._then, []
        for call in then:
            call()

    def then(self, call: Callable[[], object]) -> None:
        """Calls this when the interruption comes, on its thread, or at once if it has come."""
        with self._lock:
            if not self.event.is_set():
                self._then.append(call)
                return
        call()

    def bounds(self, work: Callable[[], Result], discard: Callable[[Result], None]) -> Result:
        """What ``work`` returns or raises. Raises Superseded as soon as the interruption comes: what cannot be
        interrupted goes on on a thread of its own, and what comes of it is discarded."""
        outcome: Future[Result] = Future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                _settle(partial(outcome.set_exception, error))
            else:
                if not _settle(partial(outcome.set_result, result)):
                    discard(result)

        threading.Thread(target=run, name="forming", daemon=True).start()
        self.then(outcome.cancel)
        try:
            return outcome.result()
        except CancelledError:
            raise Superseded from None


def _settle(settle: Callable[[], None]) -> bool:
    """False when nobody waits for it any more."""
    try:
        settle()
    except InvalidStateError:
        return False
    return True
