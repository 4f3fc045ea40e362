"""Which rank of a group is slow at the same work.

A step waits for its slowest rank, so one that gets less of its processor than the others (or a slower one) holds all of
them up, and waiting hides who it is: everybody's steps take as long. What tells is the time not spent on waiting. Ranks
differ in what they have to do, and so they are compared kindly. A step's own time grows with its tokens, with the
keys that they read and with the rows of its experts, never more than in proportion, since much of it is there anyhow.
So what one rank took bounds what another may take for its work, and a rank is judged by the median of these bounds.

A pure state machine over what all ranks have told each other: every rank runs it, and all name the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

JUDGEMENTS = 4  # observations that must agree before a name changes: one that is out of line changes nothing
SLOW, WELL = 1.5, 1.25  # times what it may take: named from the one on, until below the other
LEAST_S = 0.01  # that a rank may take, lest a few tokens decide


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank did over some steps, the same steps for all."""

    tokens: int  # of its own sequences
    rows: int  # that its experts computed, over all layers
    kv_blocks: int  # of keys and values in use, summed over the steps
    own_s: float  # not waiting for any peer

    def bound_s(self, other: Work) -> float | None:
        """How long a rank as fast as this one takes at most for the work of ``other``; None if this one has done none
        of a kind that the other has."""
        tokens, rows, blocks = (
            _times(other.tokens, self.tokens),
            _times(other.rows, self.rows),
            _times(other.kv_blocks, self.kv_blocks),
        )
        if tokens is None or rows is None or blocks is None:
            return None
        return self.own_s * max(rows, tokens * blocks)  # the work of attention is tokens times keys


def _times(theirs: int, mine: int) -> float | None:
    """How many times more, at least 1."""
    return max(1.0, theirs / mine) if mine else None if theirs else 1.0


class Stragglers:
    """``slowness_R`` is 1 for ranks that nobody has reason to complain of."""

    def __init__(self, num_ranks: int) -> None:
        self._ratios_R: list[deque[float]] = [deque(maxlen=JUDGEMENTS) for _ in range(num_ranks)]
        self.slowness_R = (1.0,) * num_ranks
        """By rank: how many times longer it takes than the others for the same work, once it is named for that."""

    def observe(self, works: Sequence[Work]) -> None:
        """Takes in what every rank did since the last call. What says too little of a rank changes nothing."""
        for rank, (work, ratios) in enumerate(zip(works, self._ratios_R, strict=True)):
            bounds = [other.bound_s(work) for other in (*works[:rank], *works[rank + 1 :])]
            told = [bound for bound in bounds if bound is not None]
            if told and median(told) >= LEAST_S:
                ratios.append(work.own_s / median(told))
        self.slowness_R = tuple(map(_named, self.slowness_R, self._ratios_R))


def _named(was: float, ratios: Sequence[float]) -> float:
    if len(ratios) < JUDGEMENTS:
        return was
    is_named = min(ratios) >= SLOW or (was > 1 and max(ratios) >= WELL)
    return max(median(ratios), WELL) if is_named else 1.0
