"""Sorting the deltas of many sequences into the streams of their requests. One asyncio loop, no locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from moestro.protos.errors import Overloaded
from moestro.protos.sequences import SequenceDelta


class QueuedDeltas:
    """Implements ``DeltaStream``: filled by the table, drained by the edge."""

    def __init__(self, cancel: Callable[[str], None], sequence_ids: Sequence[str]) -> None:
        self._cancel = cancel
        self._open = set(sequence_ids)
        self._deltas: list[SequenceDelta] = []
        self._failure: Exception | None = None
        self._ready = asyncio.Event()

    async def next(self) -> list[SequenceDelta]:
        while not self._deltas:
            if self._failure is not None:
                raise self._failure
            self._ready.clear()
            await self._ready.wait()
        deltas, self._deltas = self._deltas, []
        return deltas

    def cancel(self, sequence_id: str) -> None:
        if sequence_id in self._open:
            self._open.discard(sequence_id)
            self._cancel(sequence_id)

    def close(self) -> None:
        for sequence_id in tuple(self._open):
            self.cancel(sequence_id)

    def put(self, delta: SequenceDelta) -> None:
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._open.discard(delta.sequence_id)
        self._ready.set()

    def fail(self, failure: Exception) -> None:
        """Deltas that came before are still handed out, then ``next`` raises."""
        self._failure = self._failure or failure
        self._ready.set()


class DeltaStreams:
    """The open sequences of one engine, by id. ``cancel`` tells the engine to end one."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self._cancel_at_engine = cancel
        self._streams: dict[str, QueuedDeltas] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, sequence_ids: Sequence[str]) -> QueuedDeltas:
        stream = QueuedDeltas(self._cancel, sequence_ids)
        for sequence_id in sequence_ids:
            self._streams[sequence_id] = stream
        return stream

    def deliver(self, delta: SequenceDelta) -> None:
        """A delta of a sequence that was cancelled meanwhile is dropped."""
        stream = self._streams.get(delta.sequence_id)
        if stream is not None:
            if delta.finish_reason is not None:
                del self._streams[delta.sequence_id]
            stream.put(delta)

    def refuse(self, sequence_id: str, reason: str) -> None:
        """The engine did not take the sequence on."""
        stream = self._streams.pop(sequence_id, None)
        if stream is not None:
            stream.fail(Overloaded(reason))

    def fail(self, failure: Exception) -> None:
        """The engine is lost: every open stream ends with ``failure``."""
        streams = set(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.fail(failure)

    def _cancel(self, sequence_id: str) -> None:
        if self._streams.pop(sequence_id, None) is not None:
            self._cancel_at_engine(sequence_id)
