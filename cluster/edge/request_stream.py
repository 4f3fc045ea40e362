"""One open request, as its caller reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.permits import Permit
from moestro.cluster.edge.run import Run
from moestro.protos.errors import SequenceFailed, Superseded


class RequestStream:
    """An async iterator of a request's events, and a context manager that closes it. ``on_close`` is called once."""

    def __init__(
        self,
        journal: Journal,
        run: Run,
        deadline_s: float | None,
        permit: Permit,
        on_close: Callable[[RequestStream], None],
    ) -> None:
        self.journal = journal
        self.is_resumable = True
        self._run = run
        self._deadline_s = deadline_s
        self._permit = permit
        self._on_close = on_close
        self._closed = False
        self._superseded = False
        self._reader: asyncio.Task[object] | None = None

    @property
    def request_id(self) -> str:
        return self.journal.admitted.request_id

    async def next(self) -> StreamEvent | None:
        """The next event, None after the last. Raises SequenceFailed, Unavailable, Superseded, TimeoutError; closed
        then. An engine that is lost is waited out: the request goes on elsewhere."""
        self._reader = asyncio.current_task()
        try:
            while not self.journal.finished and not self._closed:
                if self._deadline_s is None:
                    accepted = await self._run.next()
                else:
                    async with asyncio.timeout_at(self._deadline_s):
                        accepted = await self._run.next()
                if accepted.event is not None:
                    if accepted.event.usage is not None:
                        self.close()
                    return accepted.event
        except asyncio.CancelledError:
            self.close()
            if not self._superseded:
                raise
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
        except BaseException as error:
            self.is_resumable = self.is_resumable and not isinstance(error, SequenceFailed)
            self.close()
            raise
        finally:
            self._reader = None
        if self._superseded:
            raise Superseded("a later call has resumed this stream")
        return None

    def num_unread(self) -> int:
        """Tokens that have come and were not asked for."""
        return self._run.num_unread()

    def close(self) -> None:
        """Cancels what still runs and gives the place back. Idempotent."""
        if not self._closed:
            self._closed = True
            self._run.close()
            self._on_close(self)
            self._permit.give_back(
                first_s=self.journal.first_token_s, written=self.journal.num_written, finished=self.journal.finished
            )

    def supersede(self) -> None:
        """Closes it for its reader, who is told Superseded."""
        self._superseded = True
        self.close()
        if self._reader is not None:
            self._reader.cancel()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
