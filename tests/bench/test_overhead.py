"""The overhead benchmark measures what it says, on small sizes."""

from __future__ import annotations

import pytest
from benchmarks.overhead.growth import CURVES, Curve, slope
from benchmarks.overhead.host_path import PARTS, host_round, scheduler_round
from benchmarks.overhead.load import BLOCK_SIZE, TOKEN, config, fill

from moestro.workers.scheduler import Scheduler


def test_every_part_of_a_step_is_timed() -> None:
    parts = host_round(4, 5)
    assert set(parts) == {*PARTS, "step"}
    assert all(us > 0 for us in parts.values())
    alone = scheduler_round(4, 5, num_waiting=3)
    assert alone["plan"] > 0 < alone["apply"]


def test_the_load_is_n_decodes_in_every_step() -> None:
    scheduler = Scheduler(config(20, 200))
    fill(scheduler, 20)
    for _ in range(2 * BLOCK_SIZE):
        plan = scheduler.plan(0.0)
        assert (plan.num_decodes, len(plan.spans)) == (20, 20)
        assert len(scheduler.apply(plan, {str(number): TOKEN for number in range(20)}, 0.0)) == 20
    assert scheduler.load().num_waiting == 0


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_slope_is_the_power(power: float) -> None:
    assert slope({size: 3.0 * size**power for size in (10, 100, 1000, 5000)}) == pytest.approx(power)


def test_slope_is_that_of_the_large_end() -> None:
    assert slope({1: 100.0, 10: 100.0, 100: 200.0, 1000: 2000.0, 10_000: 20_000.0}) == pytest.approx(1.0)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: f"{curve.title}, {curve.of}")
def test_every_curve_has_a_point(curve: Curve) -> None:
    assert curve.case(32) > 0
