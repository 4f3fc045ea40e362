"""One open request, as its caller reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.permits import Permit
from moestro.cluster.edge.run import Run
from moestro.protos.errors import EngineLost, Overloaded, SequenceFailed, Superseded, Unavailable


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

    @property
    def request_id(self) -> str:
        return self.journal.admitted.request_id

    async def next(self) -> StreamEvent | None:
        """The next event, None after the last. Raises SequenceFailed, Unavailable, Superseded, TimeoutError; closed
        then. An engine that is lost is waited out: the request goes on elsewhere."""
        try:
            while not self.journal.finished and not self._closed:
                try:
                    if self._deadline_s is None:
                        deltas = await self._run.deltas.next()
                    else:
                        async with asyncio.timeout_at(self._deadline_s):
                            deltas = await self._run.deltas.next()
                except (EngineLost, Overloaded) as failure:
                    async with asyncio.timeout_at(self._deadline_s):
                        await self._run.recover(failure)
                    continue
                if self._closed:
                    break
                event = self._run.accept(deltas)
                if event is not None:
                    if event.usage is not None:
                        self.close()
                    return event
        except BaseException as error:
            self.is_resumable = self.is_resumable and not isinstance(error, SequenceFailed)
            self.close()
            if not (self._superseded and isinstance(error, Unavailable)):
                raise
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
