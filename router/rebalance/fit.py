"""Straight lines through measurements, and whether later ones lie above them.

Sums are ``math.fsum``'s, which are exact before one rounding, so that every rank gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 4
"""Samples below which nothing is concluded."""

Sample = tuple[float, float, float]
"""(steps, units, seconds)"""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = per_step * steps + per_unit * units, both at least 0; ``spread`` is the standard deviation of a sample
    around it."""

    per_step: float
    per_unit: float
    spread: float
    moments: tuple[float, float, float]  # sums of steps², steps x units, units² over the samples

    def expects(self, samples: Sequence[Sample]) -> float:
        return math.fsum(self.per_step * steps + self.per_unit * units for steps, units, _ in samples)

    def leverage(self, steps: float, units: float) -> float:
        """The variance of what is expected of so many steps and units, in variances of one sample: large where the
        samples say little."""
        steps_sq, mixed, units_sq = self.moments
        if _proportional(self.moments):
            return units * units / units_sq
        numerator = steps * steps * units_sq - 2 * steps * units * mixed + units * units * steps_sq
        return numerator / (steps_sq * units_sq - mixed * mixed)


def _proportional(moments: tuple[float, float, float]) -> bool:
    steps_sq, mixed, units_sq = moments
    return steps_sq * units_sq - mixed * mixed <= 1e-9 * steps_sq * units_sq


def fit(samples: Sequence[Sample]) -> Line | None:
    """Least squares with both coefficients at least 0. None with fewer than FEWEST samples or without units.

    When steps and units are proportional nothing tells their costs apart, and all is put on the units.
    """
    steps_sq = math.fsum(n * n for n, _, _ in samples)
    units_sq = math.fsum(x * x for _, x, _ in samples)
    mixed = math.fsum(n * x for n, x, _ in samples)
    steps_y = math.fsum(n * y for n, _, y in samples)
    units_y = math.fsum(x * y for _, x, y in samples)
    if len(samples) < FEWEST or units_sq == 0 or steps_sq == 0:
        return None
    moments = (steps_sq, mixed, units_sq)
    per_step, per_unit = 0.0, units_y / units_sq
    if not _proportional(moments):
        determinant = steps_sq * units_sq - mixed * mixed
        per_step = (steps_y * units_sq - units_y * mixed) / determinant
        per_unit = (units_y * steps_sq - steps_y * mixed) / determinant
        if per_unit < 0:
            per_step, per_unit = steps_y / steps_sq, 0.0
        elif per_step < 0:
            per_step, per_unit = 0.0, units_y / units_sq
    squares = math.fsum((y - per_step * n - per_unit * x) ** 2 for n, x, y in samples)
    return Line(per_step, per_unit, math.sqrt(squares / (len(samples) - 2)), moments)


@dataclass(frozen=True, slots=True)
class Change:
    """Measured less expected, as a fraction of the expected and in seconds; ``noise`` is two standard errors of the
    fraction."""

    fraction: float
    noise: float
    excess_s: float


def compare(before: Line, after: Sequence[Sample]) -> Change | None:
    """How much longer ``after`` took than ``before`` expects. None if there is too little of it."""
    expected = before.expects(after)
    if len(after) < FEWEST or expected <= 0:
        return None
    excess = math.fsum(y for *_, y in after) - expected
    ratio = 1 + excess / expected
    own = [y - ratio * (before.per_step * n + before.per_unit * x) for n, x, y in after]
    spread_after = math.sqrt(math.fsum(r * r for r in own) / (len(after) - 1))
    spread = max(before.spread, spread_after)
    steps, units = (math.fsum(sample[i] for sample in after) for i in range(2))
    error = spread * math.sqrt(len(after) + before.leverage(steps, units))
    return Change(excess / expected, 2 * error / expected, excess)


@dataclass(slots=True)
class Learned:
    """A ratio, known first by a guess and then by measurements: the guess weighs as much as one of them, each one
    counts three quarters of the next, and what was learnt fades (to half after ``fades_s``), lest one unlucky
    measurement forbid for ever what would correct it."""

    guess: float
    fades_s: float
    _amount: float = 0.0
    _per: float = 0.0
    _count: float = 0.0
    _at: float = 0.0

    def add(self, amount: float, per: float, now: float) -> None:
        """Measured: ``amount`` for ``per`` (above 0) units."""
        self._amount = 0.75 * self._amount + amount
        self._per = 0.75 * self._per + per
        self._count = 0.75 * self._count + 1
        self._at = now

    def value(self, now: float) -> float:
        if not self._count:
            return self.guess
        measured = max(0.0, self._amount / self._per)
        weight = self._count / (1 + (now - self._at) / self.fades_s)
        return (self.guess + weight * measured) / (1 + weight)
