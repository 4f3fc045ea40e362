"""Has a plan paid? By the rows that came, layer by layer, and by the clock, as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.router.rebalance.cost_model import Appraisal
from moestro.router.rebalance.fit import Change


@dataclass(frozen=True, slots=True)
class Moved:
    """A layer that a plan moved: what that has saved by the rows that came, and going back."""

    layer: int
    rate: float  # seconds of step time saved per second
    way_back: Appraisal  # if the rows are right, and it now saves the opposite
    way_back_by_clock: Appraisal  # if the clock is right, and this layer is to blame for its part of the loss


@dataclass(frozen=True, slots=True)
class Verdict:
    layer: int
    paid: bool
    undo: bool
    reason: str


def judge(moved: Sequence[Moved], change: Change | None, min_gain: float) -> list[Verdict]:
    """A layer that did not pay is undone by the same rule by which it moved: if the way back saves more than it costs.

    The clock cannot tell layers apart, so it condemns all or none. It is believed beyond its noise and ``min_gain``.
    """
    worse = change is not None and change.fraction > change.noise + min_gain
    back_pays = math.fsum(m.way_back_by_clock.saved_s - m.way_back_by_clock.cost_s for m in moved) > 0
    clock = (
        f"steps took {change.fraction:+.1%} (noise {change.noise:.1%}) against the time before"
        if change
        else "too few steps to tell by the clock"
    )
    verdicts = []
    for m in moved:
        rows = f"by the rows that came {m.rate * 1e3:+.3g} ms were saved per second"
        paid = m.rate >= 0 and not worse
        undo = (worse and back_pays) or (m.rate < 0 and m.way_back.pays)
        ending = "Kept" if paid else "Undone" if undo else "Did not pay, but the way back would cost more"
        verdicts.append(Verdict(m.layer, paid, undo, f"{ending}: {rows}, {clock}."))
    return verdicts
