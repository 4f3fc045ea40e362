"""What came of the requests, as plain data. Seconds are of one monotonic clock, from the start of the experiment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise


class Verdict(Enum):
    EQUAL = "equal"  # to the bit what it would have been without faults
    DIFFERENT = "different"
    LOST = "lost"  # ended with an error, or not in time


@dataclass(frozen=True, slots=True)
class Record:
    """One request. A whole answer arrives as one message."""

    case: str
    how: str
    client: int
    sent_s: float
    ended_s: float
    arrivals_s: tuple[float, ...]  # of each message
    tokens: tuple[int, ...]  # in each message, over all choices
    verdict: Verdict
    detail: str = ""  # what differs, or why it was lost
    migrations: int = 0

    def stall_s(self, from_s: float, to_s: float) -> float:
        """The longest time within [from_s, to_s] that it was open without a message."""
        marks = [self.sent_s, *self.arrivals_s, self.ended_s]
        spans = ((max(begin, from_s), min(end, to_s)) for begin, end in pairwise(marks))
        return max((end - begin for begin, end in spans), default=0.0)

    def was_open(self, at_s: float) -> bool:
        return self.sent_s <= at_s < self.ended_s


def verdicts(records: Iterable[Record]) -> dict[str, int]:
    """How many of each."""
    counts = Counter(record.verdict for record in records)
    return {verdict.value: counts[verdict] for verdict in Verdict}
