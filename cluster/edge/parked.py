"""What was sent of streams that have ended or were cut off, for clients that come back. Sans-IO, bounded."""

from __future__ import annotations

from typing import NamedTuple

from moestro.cluster.edge.history import History


class _Entry(NamedTuple):
    history: History
    expires_s: float


class Parked:
    """At most ``capacity`` histories by request id, each for ``keep_s`` seconds. When they are too many the oldest go,
    first those of streams that were sent to their end: most of these have arrived."""

    def __init__(self, keep_s: float, capacity: int) -> None:
        self._keep_s, self._capacity = keep_s, capacity
        self._cut: dict[str, _Entry] = {}  # oldest first, as is
        self._ended: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._cut) + len(self._ended)

    def put(self, request_id: str, history: History, now_s: float) -> None:
        """Keeps one, instead of what was kept of an earlier stream of that id."""
        self.discard(request_id)
        has_ended = all(ending is not None for ending in history.endings)
        (self._ended if has_ended else self._cut)[request_id] = _Entry(history, now_s + self._keep_s)
        if len(self) > self._capacity:
            fullest = self._ended or self._cut
            del fullest[next(iter(fullest))]

    def find(self, request_id: str, now_s: float) -> History | None:
        """What is kept of that request, which stays."""
        entry = self._cut.get(request_id) or self._ended.get(request_id)
        return entry.history if entry is not None and now_s < entry.expires_s else None

    def discard(self, request_id: str) -> None:
        self._cut.pop(request_id, None)
        self._ended.pop(request_id, None)

    def expire(self, now_s: float) -> float | None:
        """Drops what has been kept long enough. When to come back, None while nothing is kept."""
        for entries in (self._cut, self._ended):
            while entries and (oldest := next(iter(entries))) and entries[oldest].expires_s <= now_s:
                del entries[oldest]
        times = [next(iter(entries.values())).expires_s for entries in (self._cut, self._ended) if entries]
        return min(times, default=None)
