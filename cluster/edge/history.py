"""What was sent of one stream, and what of that a client says has arrived. Sans-IO.

A stream that is resumed is computed again from what arrived: answers are deterministic, so what was sent and did not
arrive comes once more, perhaps cut into other events.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.sequences import FinishReason

COUNT_BITS, INDEX_BITS = 28, 8
MAX_COUNT, MAX_INDEX = (1 << COUNT_BITS) - 1, (1 << INDEX_BITS) - 1


def mark(event: int, index: int, count: int) -> int:
    """After so many events (0: what had arrived when the stream was resumed) a choice has so many tokens. One number of
    64 bits, since there is one for every token of every stream; they grow with the event."""
    return event << (COUNT_BITS + INDEX_BITS) | index << COUNT_BITS | count


class ArrivedChoice(NamedTuple):
    """What had arrived of one choice."""

    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """Where a client was when its stream was cut off: the number of the last event that arrived (None: none did), and
    by index every choice of which something did. Without choices the number alone is known."""

    last_number: int | None = None
    choices: Mapping[int, ArrivedChoice] = field(default_factory=dict)

    @property
    def next_number(self) -> int:
        """Of the first event that is to come."""
        return 0 if self.last_number is None else self.last_number + 1


@dataclass(frozen=True, slots=True)
class History:
    """The tokens of every choice of one stream, and which event brought them: ``marks`` has one for every choice in
    every event, in order, made by ``mark``."""

    digest: str  # of the request
    token_ids: Sequence[Sequence[int]]  # by choice
    endings: Sequence[tuple[FinishReason, int] | None]  # by choice: why, and the number of the event that said so
    marks: array[int]
    first_number: int  # of the events that it knows of: more than 0 when the stream was itself resumed
    next_number: int

    def arrived(self, last_number: int | None) -> Arrived:
        """What a client has whose last event was that. Raises InvalidRequest when no such event was sent."""
        arrived = Arrived(last_number)
        if not self.first_number <= arrived.next_number <= self.next_number:
            described = f"must be in [{self.first_number - 1}, {self.next_number - 1}], is {last_number}"
            raise InvalidRequest([FieldViolation("resume.last_sequence_number", described)])
        counts: dict[int, int] = {}
        end = mark(arrived.next_number - self.first_number + 1, 0, 0)
        for each in self.marks[: bisect_left(self.marks, end)]:
            counts[each >> COUNT_BITS & MAX_INDEX] = each & MAX_COUNT
        choices = {}
        for index, count in counts.items():
            ending = self.endings[index]
            reason = ending[0] if ending is not None and ending[1] < arrived.next_number else None
            choices[index] = ArrivedChoice(tuple(self.token_ids[index][:count]), reason)
        return Arrived(last_number, choices)
