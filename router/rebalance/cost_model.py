"""What a move of experts saves and what it costs, both in seconds of step time.

Legend: B buckets of time, L mixture layers, E logical experts, R ranks.

Assumptions, each on the cautious side or checked afterwards by measurement:

- a step waits in every layer for the rank with the most rows (bulk-synchronous dispatch and combine);
- expert time is linear in rows, ``per_step * steps + per_row * rows``, fitted over ranks and buckets; only the part
  per row moves with an expert;
- replicas share their expert's rows equally (EPLB);
- the rows of a rank that is known to be slow take as many times longer, and are counted as so many more;
- no more can be saved than the ranks were measured to wait for each other: what is hidden behind other work, or was
  the skew of single steps that evens out over a bucket, is taken off by ``exposed``;
- traffic after a decision resembles the traffic it was tried on, for as long as the horizon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.router.rebalance.fit import Sample, fit
from moestro.router.rebalance.messages import Floats
from moestro.router.rebalance.tables import Tables, in_order, rows_by_rank
from moestro.router.rebalance.window import Bucket


@dataclass(frozen=True, slots=True)
class Rates:
    """What buckets say about time."""

    wall_s: float
    steps_s: float
    s_per_row: float  # of the busiest rank, as far as anybody waits for it

    def fraction(self, seconds: float) -> float:
        """Seconds of step time over these buckets, as a part of it."""
        return seconds / self.steps_s if self.steps_s else 0.0


def step_samples(buckets: Sequence[Bucket]) -> list[Sample]:
    """Step time by tokens, of the buckets that had any."""
    return [(float(b.steps), float(b.tokens), b.steps_s) for b in buckets if b.tokens]


def measure(buckets: Sequence[Bucket]) -> Rates:
    experts = fit(
        [
            (float(bucket.steps), float(rows), seconds)
            for bucket in buckets
            for rows, seconds in zip(bucket.rows_R.tolist(), bucket.experts_s_R.tolist(), strict=True)
            if bucket.tokens
        ]
    )
    per_row = experts.per_unit if experts else 0.0
    excess_s = per_row * math.fsum(bucket.excess_rows for bucket in buckets)
    waiting_s = math.fsum(bucket.waiting_s for bucket in buckets)
    exposed = min(1.0, waiting_s / excess_s) if excess_s > 0 else 1.0
    return Rates(
        wall_s=math.fsum(bucket.seconds for bucket in buckets),
        steps_s=math.fsum(bucket.steps_s for bucket in buckets),
        s_per_row=per_row * exposed,
    )


def excess_rows(tables: Tables, buckets: Sequence[Bucket]) -> float:
    """Rows that the busiest ranks of all layers compute above the mean, without those that are only chance: the busiest
    rank is picked on every other bucket and weighed on the rest, and the other way round. About 0 (or below) when load
    is balanced but for noise."""
    rows_BLR = _rows(tables, buckets)
    if len(rows_BLR) < 2:
        return 0.0
    even_LR, odd_LR = in_order(rows_BLR[0::2]), in_order(rows_BLR[1::2])
    excess_L = _picked_over_mean(even_LR, odd_LR) + _picked_over_mean(odd_LR, even_LR)
    return math.fsum(excess_L.tolist())


def _picked_over_mean(pick_LR: Floats, weigh_LR: Floats) -> Floats:
    ranks = weigh_LR.shape[1]
    picked_L1: Floats = np.take_along_axis(weigh_LR, pick_LR.argmax(axis=1)[:, None], axis=1)
    over_L: Floats = picked_L1[:, 0] - in_order(weigh_LR[:, rank] for rank in range(ranks)) / ranks
    return over_L


@dataclass(frozen=True, slots=True, eq=False)
class Fewer:
    """Rows that the busiest rank of each layer computes less under new tables than under old ones, over some buckets.
    ``surely_L`` is two standard errors (by the spread over buckets) below ``mean_L``; bursts and shifts show there."""

    mean_L: Floats
    surely_L: Floats


def fewer_rows(old: Tables, new: Tables, buckets: Sequence[Bucket], layers: Sequence[int]) -> Fewer:
    """``old`` and ``new`` hold only ``layers`` (indices into the buckets' loads). Wants at least two buckets."""
    old_BL, new_BL = (_busiest(_rows(tables, buckets, layers)) for tables in (old, new))
    less_BL = old_BL - new_BL
    count = len(less_BL)
    sum_L = in_order(less_BL)
    deviations_BL = less_BL - sum_L / count
    error_L = np.sqrt(in_order(deviations_BL * deviations_BL) * (count / (count - 1)))
    return Fewer(sum_L, sum_L - 2 * error_L)


def fewer_rows_in(bucket: Bucket, old: Tables, new: Tables, layers: Sequence[int]) -> list[float]:
    """By layer: rows that the busiest rank of this bucket computes less under ``new``."""
    old_L, new_L = (_rows(tables, (bucket,), layers)[0].max(axis=1) for tables in (old, new))
    less: list[float] = (old_L - new_L).tolist()
    return less


def _rows(tables: Tables, buckets: Sequence[Bucket], layers: Sequence[int] | None = None) -> Floats:
    if not buckets:
        return np.zeros((0, *tables.expert_LRC.shape[:2]))
    chosen = slice(None) if layers is None else list(layers)
    return rows_by_rank(tables, np.stack([bucket.loads_LE[chosen] for bucket in buckets]))


def _busiest(rows_BLR: Floats) -> Floats:
    """In every bucket the rows of the rank that has most over all of them."""
    rank_L = in_order(rows_BLR).argmax(axis=1)
    return np.take_along_axis(rows_BLR, np.broadcast_to(rank_L[None, :, None], (*rows_BLR.shape[:2], 1)), axis=2)[
        ..., 0
    ]


@dataclass(frozen=True, slots=True)
class Prices:
    """What moving costs at this moment."""

    slowdown_s_per_byte: float
    stall_s: float
    bytes_per_s: float
    horizon_s: float

    def cost_s(self, slowest_bytes: int) -> float:
        """Of one layer whose busiest loader fetches ``slowest_bytes``; ranks load side by side."""
        return slowest_bytes * self.slowdown_s_per_byte + self.stall_s

    def saved_s(self, rate: float, slowest_bytes: int) -> float:
        """By a layer that saves ``rate`` seconds of step time per second from when it is loaded to the horizon."""
        return rate * max(0.0, self.horizon_s - slowest_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """Moving one layer, valued on traffic that its placement was not made for."""

    layer: int
    rate: float  # seconds of step time saved per second, two standard errors below the mean
    saved_s: float
    cost_s: float
    bytes: int  # over all ranks
    slowest_bytes: int  # of the rank that loads most

    @property
    def pays(self) -> bool:
        return self.saved_s > self.cost_s
