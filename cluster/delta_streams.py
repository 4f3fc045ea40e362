"""Sorting the deltas of many sequences into the streams of their requests. One asyncio loop, no locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moestro.protos.errors import EngineLost, Overloaded, Unavailable
from moestro.protos.sequences import FinishReason, SequenceDelta, SequenceRequest


class QueuedDeltas:
    """Implements ``DeltaStream``: filled by the table, drained by the edge."""

    def __init__(self, cancel: Callable[[str], None], engine_ids: Mapping[str, str]) -> None:
        self._cancel = cancel
        self._open = dict(engine_ids)  # edge's id -> engine's id
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
        engine_id = self._open.pop(sequence_id, None)
        if engine_id is not None:
            self._cancel(engine_id)

    def close(self) -> None:
        for sequence_id in tuple(self._open):
            self.cancel(sequence_id)
        self.fail(Unavailable("the stream was closed"))

    def num_unread(self) -> int:
        return sum(len(delta.token_ids) for delta in self._deltas)

    def put(self, delta: SequenceDelta) -> None:
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._open.pop(delta.sequence_id, None)
        self._ready.set()

    def fail(self, failure: Exception) -> None:
        """Deltas that came before are still handed out, then ``next`` raises."""
        self._failure = self._failure or failure
        self._ready.set()


class DeltaStreams:
    """The open sequences of one engine. ``cancel`` tells the engine to end one.

    An engine sees ids that are never used twice: a client may use the name of a request again as soon as it has
    ended, while the engine still has a last word to say on the one before.
    """

    def __init__(self, owner: str, cancel: Callable[[str], None]) -> None:
        self._owner = owner
        self._cancel_at_engine = cancel
        self._streams: dict[str, tuple[QueuedDeltas, str]] = {}  # engine's id -> stream, edge's id
        self._num_opened = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def wait_none_open(self) -> None:
        """Returns when every sequence has ended."""
        await self._none_open.wait()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, sequences: Sequence[SequenceRequest]) -> tuple[QueuedDeltas, list[SequenceRequest]]:
        """A stream for the sequences of one request, and those sequences as the engine is to be told of them."""
        renamed = []
        engine_ids = {}
        for sequence in sequences:
            self._num_opened += 1
            engine_id = f"{self._owner}.{self._num_opened} {sequence.sequence_id}"
            engine_ids[sequence.sequence_id] = engine_id
            renamed.append(replace(sequence, sequence_id=engine_id))
        stream = QueuedDeltas(self._cancel, engine_ids)
        for sequence_id, engine_id in engine_ids.items():
            self._streams[engine_id] = stream, sequence_id
            self._none_open.clear()
        return stream, renamed

    def deliver(self, delta: SequenceDelta) -> None:
        """A delta of a sequence that was cancelled meanwhile is dropped; one that the engine ended unasked is lost."""
        if delta.finish_reason is FinishReason.CANCELLED:
            self.lose(delta.sequence_id, "the engine ended it")
            return
        take = self._streams.get if delta.finish_reason is None else self._pop
        entry = take(delta.sequence_id)
        if entry is not None:
            stream, sequence_id = entry
            stream.put(delta._replace(sequence_id=sequence_id))

    def refuse(self, engine_id: str, reason: str) -> None:
        """The engine did not take the sequence on."""
        entry = self._pop(engine_id)
        if entry is not None:
            entry[0].fail(Overloaded(reason))

    def lose(self, engine_id: str, reason: str) -> None:
        """The engine is well but has the sequence no more."""
        entry = self._pop(engine_id)
        if entry is not None:
            entry[0].fail(EngineLost(f"a sequence was lost: {reason}", died=False))

    def fail(self, failure: Exception) -> None:
        """The engine is lost: every open stream ends with ``failure``."""
        streams = dict.fromkeys(stream for stream, _ in self._streams.values())
        self._streams.clear()
        self._none_open.set()
        for stream in streams:
            stream.fail(failure)

    def _cancel(self, engine_id: str) -> None:
        if self._pop(engine_id) is not None:
            self._cancel_at_engine(engine_id)

    def _pop(self, engine_id: str) -> tuple[QueuedDeltas, str] | None:
        entry = self._streams.pop(engine_id, None)
        if not self._streams:
            self._none_open.set()
        return entry
