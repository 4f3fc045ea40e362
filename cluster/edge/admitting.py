"""A request on its way in, which a later call may take over: its client was cut off, and nobody here has noticed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import TracebackType

from moestro.cluster.edge.validation import ValidRequest
from moestro.protos.errors import FieldViolation, InvalidRequest, Superseded


class Admitting:
    """A context manager around the admission, entered by the task that does it."""

    def __init__(self, valid: ValidRequest) -> None:
        self._valid = valid
        self._task = asyncio.current_task()
        self._superseded = False

    def supersede(self, valid: ValidRequest) -> None:
        """Ends it with Superseded. Raises InvalidRequest when ``valid`` asks for something else."""
        if replace(valid, resume=None) != replace(self._valid, resume=None):
            raise not_as_it_was()
        self._superseded = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._superseded and isinstance(error, asyncio.CancelledError) and self._task is not None:
            self._task.uncancel()
            raise Superseded("a later call has resumed this request")


def not_as_it_was() -> InvalidRequest:
    return InvalidRequest([FieldViolation("resume", "the rest of the request is not as it was")])
