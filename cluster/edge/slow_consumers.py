"""Clients that do not read: found by looking around now and then, so that a token costs no timer; cut off on their own.

HTTP/2's flow control makes a write wait while the client's window is full. Until then nothing is held for it but what
the engine goes on writing, and that is bounded here too. A client that is cut off is told why when it reads on; until
then, or until it hangs up, gRPC keeps the call and what is on its way, some kilobytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Protocol

from moestro.protos.errors import SlowConsumer

LOOK_S = 0.25  # between two looks; tokens held and seconds waited may exceed their limits by what comes meanwhile


class Unread(Protocol):
    """A stream that holds what has not been taken from it."""

    def num_unread(self) -> int: ...


class Reader:
    """One client and its stream. Whoever writes to it says where it is: ``writing`` is the number of the message that
    is being written, None between two."""

    def __init__(self, stream: Unread, task: asyncio.Task[object]) -> None:
        self.writing: int | None = None
        self.cut_for = ""  # why, once it is cut off
        self._stream = stream
        self._task = task
        self._seen: int | None = None
        self._since_s = 0.0

    def stalled_s(self, now_s: float) -> float:
        """How long the same message has been seen being written."""
        if self.writing is None or self.writing != self._seen:
            self._seen, self._since_s = self.writing, now_s
        return now_s - self._since_s

    def num_unread(self) -> int:
        """Tokens held for it; none while it is waited for the engine."""
        return 0 if self.writing is None else self._stream.num_unread()

    def cut(self, reason: str) -> None:
        """Ends its write, and no other's."""
        self.cut_for = reason
        self._task.cancel()

    def uncut(self) -> bool:
        """Whether a cancellation of this task was our own, which then is taken back."""
        return bool(self.cut_for) and self._task.uncancel() == 0


class SlowConsumers:
    """Watches the readers of one server, on one asyncio loop."""

    def __init__(self, stall_s: float, max_unread_tokens: int) -> None:
        self._stall_s = stall_s
        self._max_unread_tokens = max_unread_tokens
        self._readers: dict[Reader, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.num_cut = 0

    @contextlib.contextmanager
    def watch(self, stream: Unread) -> Iterator[Reader]:
        """For the task that reads from ``stream`` and writes to its client. Raises SlowConsumer inside when the client
        does not read."""
        task = asyncio.current_task()
        assert task is not None
        reader = Reader(stream, task)
        self._readers[reader] = None
        if self._timer is None:
            self._look_later()
        try:
            yield reader
        except asyncio.CancelledError:
            if not reader.uncut():
                raise
            raise SlowConsumer(reader.cut_for) from None
        finally:
            self._readers.pop(reader, None)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look_around)

    def _look_around(self) -> None:
        """Comes again as long as there is somebody to look at."""
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        for reader in tuple(self._readers):
            if reader.stalled_s(now_s) > self._stall_s:
                self._cut(reader, f"nothing was read for {self._stall_s:g} s")
            elif (unread := reader.num_unread()) > self._max_unread_tokens:
                self._cut(reader, f"{unread} tokens wait to be read, at most {self._max_unread_tokens} may")
        if self._readers:
            self._look_later()

    def _cut(self, reader: Reader, reason: str) -> None:
        if not reader.cut_for:
            self.num_cut += 1
            reader.cut(f"the stream was cut off and can be resumed: {reason}")
