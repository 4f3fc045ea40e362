"""The soak must see what grows, and nothing else."""

from __future__ import annotations

from benchmarks.chaos.memory import History, Sample, mb_per_minute
from benchmarks.chaos.soak import growth
from benchmarks.chaos.strikes import Seen


def history(title: str, minutes: int, mb_per_min: float, start_mb: float = 100.0) -> History:
    """Grows by 50 MB in its first minute, then as told."""
    samples = [
        Sample(2.0 * i, int((start_mb + min(i, 30) * 50 / 30 + mb_per_min * max(0, 2 * i - 60) / 60) * 1e6), 10, 3)
        for i in range(minutes * 30)
    ]
    return History(title, 1, samples)


def test_a_slope_is_of_what_comes_after_the_warm_up() -> None:
    grows = history("ray::Rank", 10, 0.5)
    assert abs(mb_per_minute(grows.after(60.0)) - 0.5) < 1e-3
    assert mb_per_minute(grows.after(0.0)) > 1.0
    assert mb_per_minute([]) == 0.0


def test_judged_is_what_is_ours_and_lived_long_enough() -> None:
    histories = [history("ray::Rank", 10, 0.5), history("raylet", 10, 9.0), history("ray::Rank", 2, 9.0)]
    rows = growth(histories, [Seen(0.0, serving=3)], 3, 60.0, 300.0)
    assert [(row["process"], row["judged"]) for row in rows] == [
        ("ray::Rank", True),
        ("raylet", False),
        ("ray::Rank", False),
    ]
    assert abs(rows[0]["mb_per_minute"] - 0.5) < 1e-3


def test_what_a_rank_holds_for_those_that_are_missing_is_no_growth() -> None:
    """A group that is weak more often towards the end."""
    seen, samples = [], []
    for second in range(600):
        weak = second % 60 < second / 15
        seen.append(Seen(float(second), serving=2 if weak else 3))
        samples.append(Sample(second + 0.5, 110_000_000 if weak else 100_000_000, 10, 3))
    (row,) = growth([History("ray::Rank", 1, samples)], seen, 3, 60.0, 300.0)
    assert row["mb_per_minute"] == 0.0
    assert growth([History("ray::Rank", 1, samples)], [], 3, 60.0, 300.0) == []  # never known to be whole
