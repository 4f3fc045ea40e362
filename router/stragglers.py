"""Which rank of a group is slow at the same work.

Legend: R ranks.

A step waits for its slowest rank, so one that gets less of its processor than the others (or a slower one) holds all of
them up, and waiting hides who it is: the others' steps take as long. What tells is the time that experts took for their
rows, without any waiting. Where ranks differ in rows they are compared kindly. Time grows with rows, and less than in
proportion (a weight is read once for all of them): from one rank's time for its rows, another's can be at most as much,
or in proportion if it has more rows. A rank is judged by the median of what the others' times allow it.

A pure state machine over observations, which are the same on every rank: all name the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from moestro.router.rebalance.messages import Observation

JUDGEMENTS = 4  # observations that must agree before a name changes: one that is out of line changes nothing
SLOW, WELL = 1.5, 1.25  # times what is allowed: named from the one on, until below the other
LEAST_S = 0.005  # of expert time that a rank is allowed, lest a few rows decide


class Stragglers:
    """``slowness_R`` is 1 for ranks that nobody has reason to complain of."""

    def __init__(self, num_ranks: int) -> None:
        self._ratios: deque[tuple[float, ...]] = deque(maxlen=JUDGEMENTS)
        self.slowness_R = (1.0,) * num_ranks
        """By rank: how many times longer it takes than the others for the same work, once it is named for that."""

    def observe(self, seen: Observation) -> None:
        """Takes in what all ranks did since the last call. What says too little changes nothing."""
        allowed_R = allowed(seen.rows_LRC.sum(axis=(0, 2)).tolist(), seen.experts_s_R.tolist())
        if min(allowed_R) < LEAST_S:
            return
        self._ratios.append(tuple(s / most for s, most in zip(seen.experts_s_R.tolist(), allowed_R, strict=True)))
        if len(self._ratios) == JUDGEMENTS:
            by_rank = zip(*self._ratios, strict=True)
            self.slowness_R = tuple(_named(*pair) for pair in zip(self.slowness_R, by_rank, strict=True))


def allowed(rows_R: Sequence[int], seconds_R: Sequence[float]) -> list[float]:
    """By rank the seconds it may take by what the others took; 0 where they say nothing."""
    bounds_R = []
    for rank, mine in enumerate(rows_R):
        others = [(s, rows) for r, (rows, s) in enumerate(zip(rows_R, seconds_R, strict=True)) if r != rank and rows]
        bounds_R.append(median(s * max(1.0, mine / rows) for s, rows in others) if others else 0.0)
    return bounds_R


def _named(was: float, ratios: Sequence[float]) -> float:
    is_named = min(ratios) >= SLOW or (was > 1 and max(ratios) >= WELL)
    return max(median(ratios), WELL) if is_named else 1.0
