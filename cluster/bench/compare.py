"""Two reports side by side: the ratio of every number they share, and what else differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from moestro.cluster.bench.headline import NUMBERS, Number
from moestro.cluster.bench.report import Report
from moestro.cluster.bench.summaries import Spread

Verdict = Literal["better", "worse", "unclear"]
_NOT_COMPARED = {"date", "commit", "dirty", "rounds", "seed"}  # expected to differ, or shown by the ranges


@dataclass(frozen=True, slots=True)
class Ratio:
    """One number in both reports. ``ratio`` is new over base of the medians (None: the base is 0). ``verdict`` is
    unclear while the ranges over rounds overlap, or when either report has a single round: one run shows no spread."""

    number: Number
    base: Spread
    new: Spread
    ratio: float | None
    verdict: Verdict


def compare(base: Report, new: Report) -> tuple[Ratio, ...]:
    """The ratios of all shared numbers, in the order of the table."""
    spread_known = min(len(base.rounds), len(new.rounds)) > 1
    ratios = []
    for number in NUMBERS:
        before, after = base.over_rounds.get(number.key), new.over_rounds.get(number.key)
        if before is None or after is None:
            continue
        ratio = after.median / before.median if before.median else None
        verdict = _verdict(number, before, after) if spread_known else "unclear"
        ratios.append(Ratio(number, before, after, ratio, verdict))
    return tuple(ratios)


def differences(base: Report, new: Report) -> tuple[str, ...]:
    """Settings, target and hardware that are not the same, as ``name: base -> new``: the ratios mean what they seem
    to only when what differs here is what was meant to differ."""
    pairs = (
        ("", dict(base.settings), dict(new.settings)),
        ("target.", asdict(base.target), asdict(new.target)),
        ("hardware.", dict(base.hardware), dict(new.hardware)),
    )
    return tuple(line for prefix, before, after in pairs for line in _different(prefix, before, after))


def _different(prefix: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    names = [name for name in {**before, **after} if name not in _NOT_COMPARED]
    return [
        f"{prefix}{name}: {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _verdict(number: Number, before: Spread, after: Spread) -> Verdict:
    if after.min > before.max:
        return "better" if number.better == "higher" else "worse"
    if after.max < before.min:
        return "better" if number.better == "lower" else "worse"
    return "unclear"
