"""Every decision about experts, whether something moved or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

KEPT = 256
"""Entries; older ones live on in the totals."""


class Trigger(StrEnum):
    AUTO = "auto"
    OPERATOR = "operator"
    UNDO = "undo"


class Outcome(StrEnum):
    REFUSED = "refused"  # nothing was touched
    LOADING = "loading"
    CANCELLED = "cancelled"  # before its switch: the old placement stayed
    SETTLING = "settling"  # switched, being measured
    KEPT = "kept"
    UNDONE = "undone"  # switched and found not to pay; another entry tells of the way back


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision; a move of one layer, or (``layer`` None) the decision to move nothing."""

    number: int
    at: float
    trigger: Trigger
    outcome: Outcome
    reason: str
    layer: int | None = None
    verdict: str = ""
    """Why it ended as it did."""
    bytes: int = 0
    """Weights loaded by all ranks together."""
    predicted_s: float | None = None
    """Step time to be saved over the horizon; None when nobody asked."""
    cost_s: float | None = None
    """Step time that moving was predicted to cost."""
    stall_s: float | None = None
    """Measured: how long the switch held up the step."""
    slowdown_s: float | None = None
    """Measured: step time lost to loading; negative by noise."""
    realised_s: float | None = None
    """Step time saved so far, by the rows that came: what the busiest rank would have computed without the move."""
    kind: str = ""
    """What sort of refusal; those of a kind share an entry until the next move."""
    times: int = 1
    last_at: float | None = None
    """When the last of several times was."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the start. ``moves`` counts switches, those of undos too."""

    decisions: int = 0
    moves: int = 0
    undone: int = 0
    cancelled: int = 0
    bytes: int = 0
    stall_s: float = 0.0
    slowdown_s: float = 0.0
    cost_s: float = 0.0
    realised_s: float = 0.0


class Ledger:
    def __init__(self) -> None:
        self.totals = Totals()
        self._entries: dict[int, Entry] = {}
        self._next = 0

    def __iter__(self) -> Iterator[Entry]:
        """Oldest first."""
        return iter(self._entries.values())

    def refuse(self, at: float, trigger: Trigger, kind: str, reason: str) -> None:
        """A decision to move nothing. Repeats of a kind since the last move become one entry with the newest reason."""
        self._count(decisions=1)
        for entry in reversed(self._entries.values()):
            if entry.layer is not None:
                break
            if (entry.kind, entry.trigger) == (kind, trigger):
                again = replace(entry, times=entry.times + 1, last_at=at, reason=reason)
                self._entries[entry.number] = again
                return
        self._append(Entry(self._next, at, trigger, Outcome.REFUSED, reason, kind=kind))

    def load(
        self,
        at: float,
        trigger: Trigger,
        layer: int,
        reason: str,
        *,
        bytes: int,
        cost_s: float,
        predicted_s: float | None = None,
    ) -> int:
        """A layer begins to load. The number by which to amend this entry."""
        self._count(decisions=1, bytes=bytes, cost_s=cost_s)
        entry = Entry(
            self._next, at, trigger, Outcome.LOADING, reason, layer, bytes=bytes, predicted_s=predicted_s, cost_s=cost_s
        )
        self._append(entry)
        return entry.number

    def switched(self, number: int) -> None:
        self._count(moves=1)
        self._amend(number, outcome=Outcome.SETTLING)

    def stalled(self, number: int, stall_s: float) -> None:
        self._count(stall_s=stall_s)
        self._amend(number, stall_s=stall_s)

    def slowed(self, number: int, slowdown_s: float) -> None:
        self._count(slowdown_s=slowdown_s)
        self._amend(number, slowdown_s=slowdown_s)

    def realised(self, number: int, gained_s: float) -> None:
        """What a move has saved since this was last called for it."""
        self._count(realised_s=gained_s)
        if number in self._entries:
            self._amend(number, realised_s=(self._entries[number].realised_s or 0.0) + gained_s)

    def ended(self, number: int, outcome: Outcome, verdict: str = "") -> None:
        self._count(undone=outcome is Outcome.UNDONE, cancelled=outcome is Outcome.CANCELLED)
        self._amend(number, outcome=outcome, verdict=verdict)

    def _append(self, entry: Entry) -> None:
        self._entries[entry.number] = entry
        self._next += 1
        if len(self._entries) > KEPT:
            del self._entries[next(iter(self._entries))]

    def _amend(self, number: int, **changes: Any) -> None:
        if number in self._entries:
            self._entries[number] = replace(self._entries[number], **changes)

    def _count(self, **added: float) -> None:
        self.totals = replace(self.totals, **{name: getattr(self.totals, name) + n for name, n in added.items()})
