"""The last seconds of traffic, in a few buckets.

Legend: L mixture layers, E logical experts, R ranks, C slots of a rank.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moestro.router.rebalance.messages import Floats, Ints, Observation
from moestro.router.rebalance.tables import in_order

BUCKETS = 16
"""Of a full window: it slides in steps of a sixteenth, and a mean over it has that many samples to judge its noise."""


@dataclass(slots=True)
class Bucket:
    """The sum of some successive observations."""

    start: float
    end: float
    loads_LE: Ints
    rows_R: Floats  # over all layers; these and the excess in rows of a rank that is not slow
    excess_rows: float  # over all layers: rows of the rank that had most, less the mean over ranks
    tokens: int
    steps: int
    steps_s: float  # of the slowest rank
    experts_s_R: Floats
    waiting_s: float  # mean over ranks
    loaded_bytes: int  # of the rank that loaded most

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def add(self, other: Bucket) -> None:
        self.end = other.end
        self.loads_LE = self.loads_LE + other.loads_LE
        self.rows_R = self.rows_R + other.rows_R
        self.excess_rows += other.excess_rows
        self.tokens += other.tokens
        self.steps += other.steps
        self.steps_s += other.steps_s
        self.experts_s_R = self.experts_s_R + other.experts_s_R
        self.waiting_s += other.waiting_s
        self.loaded_bytes += other.loaded_bytes


def bucket_of(seen: Observation, loads_LE: Ints, slowness_R: Floats, start: float) -> Bucket:
    rows_LR: Floats = seen.rows_LRC.sum(axis=2) * slowness_R
    rows_R = in_order(rows_LR)
    ranks = len(rows_R)
    return Bucket(
        start=start,
        end=seen.now,
        loads_LE=loads_LE,
        rows_R=rows_R,
        excess_rows=math.fsum(rows_LR.max(axis=1).tolist()) - math.fsum(rows_R.tolist()) / ranks,
        tokens=int(seen.tokens_R.sum()),
        steps=seen.steps,
        steps_s=float(seen.steps_s_R.max()),
        experts_s_R=seen.experts_s_R,
        waiting_s=math.fsum(seen.waiting_s_R.tolist()) / ranks,
        loaded_bytes=int(seen.loaded_bytes_R.max()),
    )


@dataclass(slots=True)
class Window:
    """Closed buckets of the last ``seconds``, and the one that is filling. Adding is O(1) in the window's length and
    in the number of steps."""

    seconds: float
    shape_LE: tuple[int, int]
    closed: deque[Bucket] = field(default_factory=deque)
    _open: Bucket | None = None
    _last: float | None = None
    loads_LE: Ints = field(init=False)  # sum of the closed buckets; replaced, never written to

    def __post_init__(self) -> None:
        self.loads_LE = np.zeros(self.shape_LE, dtype=np.int64)

    def add(self, seen: Observation, loads_LE: Ints, slowness_R: Floats) -> tuple[Bucket, ...]:
        """The buckets that this observation closed. The very first observation only starts the clock. Of a long sleep
        no more than one window counts."""
        last, self._last = self._last, seen.now
        if last is None:
            return ()
        if seen.now < last:
            raise ValueError(f"now must not run backwards: {seen.now} after {last}")
        bucket = bucket_of(seen, loads_LE, slowness_R, max(last, seen.now - self.seconds))
        closed = self.cut() if bucket.start > last else ()
        if self._open is None:
            self._open = bucket
        else:
            self._open.add(bucket)
        if self._open.seconds >= self.seconds / BUCKETS:
            closed += self.cut()
        while self.closed and self.closed[0].end <= seen.now - self.seconds:
            self.loads_LE = self.loads_LE - self.closed.popleft().loads_LE
        return closed

    def cut(self) -> tuple[Bucket, ...]:
        """Closes the bucket that is filling, so that none spans this moment. It, or nothing."""
        if self._open is None:
            return ()
        closed, self._open = self._open, None
        self.closed.append(closed)
        self.loads_LE = self.loads_LE + closed.loads_LE
        return (closed,)

    def since(self, start: float) -> tuple[Bucket, ...]:
        """Closed buckets that began at ``start`` or later."""
        return tuple(bucket for bucket in self.closed if bucket.start >= start)
