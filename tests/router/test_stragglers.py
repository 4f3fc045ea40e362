"""A rank that is slow at the same work is named, and nobody else ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moestro.router.rebalance.messages import Observation
from moestro.router.stragglers import JUDGEMENTS, LEAST_S, Stragglers, allowed

STEP_S, ROW_S, EVERY_S = 2e-4, 2e-5, 2.0


class Group:
    """Observations of ranks whose time for experts is concave in their rows, as where weights are read once a step."""

    def __init__(self, num_ranks: int, seed: int = 0, noise: float = 0.1) -> None:
        self.noise, self.random, self.now = noise, np.random.default_rng(seed), 0.0
        self.stragglers = Stragglers(num_ranks)
        self.slow_R = np.ones(num_ranks)
        self.rows_R = np.full(num_ranks, 40.0)  # of a step, in the mean
        self.steps = 200

    def observe(self, count: int = 1) -> list[float]:
        for _ in range(count):
            self.now += EVERY_S
            rows_R = self.random.poisson(self.rows_R * self.steps)
            seconds_R = self.steps * STEP_S + ROW_S * self.steps * (rows_R / self.steps) ** 0.8
            seconds_R *= self.slow_R * self.random.lognormal(0.0, self.noise, len(rows_R))
            zeros_R = np.zeros(len(rows_R))
            self.stragglers.observe(
                Observation(
                    self.now,
                    self.steps,
                    rows_R[None, :, None],
                    zeros_R,
                    seconds_R,
                    seconds_R,
                    zeros_R,
                    zeros_R,
                    zeros_R,
                )
            )
        return list(self.stragglers.slowness_R)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 16])
@pytest.mark.parametrize("slow", [2.0, 5.0])
def test_a_slow_rank_is_named_in_time_and_forgiven(num_ranks: int, slow: float) -> None:
    group = Group(num_ranks)
    assert group.observe(20) == [1.0] * num_ranks
    group.slow_R[1] = slow
    named = group.observe(2 * JUDGEMENTS)
    assert 2 * JUDGEMENTS * EVERY_S < 30
    assert named[1] == pytest.approx(slow, rel=0.3)
    assert [x for rank, x in enumerate(named) if rank != 1] == [1.0] * (num_ranks - 1)
    group.slow_R[1] = 1.0
    assert group.observe(6 * JUDGEMENTS) == [1.0] * num_ranks


def test_it_is_named_in_time_from_the_start_of_a_group() -> None:
    group = Group(2)
    group.slow_R[0] = 3.0
    assert group.observe(JUDGEMENTS) == [pytest.approx(3.0, rel=0.3), 1.0]


def test_two_of_five_are_named() -> None:
    group = Group(5)
    group.slow_R[[0, 2]] = 5.0
    slowness = group.observe(10)
    assert min(slowness[0], slowness[2]) > 3
    assert slowness[1] == slowness[3] == slowness[4] == 1.0


def test_what_others_allow() -> None:
    assert allowed([10, 20], [1.0, 3.0]) == [3.0, 2.0]
    assert allowed([10, 10, 10, 10], [1.0, 2.0, 3.0, 9.0]) == [3.0, 3.0, 2.0, 2.0]
    assert allowed([10, 0], [1.0, 0.5]) == [0.0, 1.0]  # who has no rows says nothing of rows
    assert allowed([10], [1.0]) == [0.0]


def test_whoever_has_more_rows_is_not_slow() -> None:
    for rows in ([400, 40, 40, 40], [4, 40, 40, 40], [0, 40, 40, 40], [1, 10, 100, 1000]):
        group = Group(4)
        group.rows_R = np.array(rows, dtype=float)
        assert group.observe(40) == [1.0] * 4, rows


def burst(group: Group) -> None:
    """Now and then one observation of one rank is far out of line."""
    group.slow_R[:] = 1.0
    if group.random.random() < 0.3:
        group.slow_R[group.random.integers(len(group.slow_R))] = 20.0


def drift(group: Group) -> None:
    """Loads wander."""
    group.rows_R *= group.random.lognormal(0.0, 0.2, len(group.rows_R))
    group.rows_R = np.clip(group.rows_R, 1, 2000)


@pytest.mark.parametrize("disturb", [burst, drift])
@pytest.mark.parametrize("seed", range(4))
def test_noise_names_nobody(disturb: Callable[[Group], None], seed: int) -> None:
    """Each observation is off by a quarter, for twenty minutes."""
    group = Group(4, seed, noise=0.12)
    for _ in range(600):
        disturb(group)
        assert group.observe() == [1.0] * 4, f"seed {seed}, at {group.now} s"


def test_too_little_work_changes_nothing() -> None:
    group = Group(2, noise=0.0)
    group.steps = 1
    group.slow_R[0] = 50.0
    assert STEP_S + 40 * ROW_S < LEAST_S
    assert group.observe(50) == [1.0, 1.0]


def test_a_rank_alone_is_never_slow() -> None:
    group = Group(1)
    assert group.observe(30) == [1.0]


def test_a_device_whose_time_the_host_does_not_see_says_nothing() -> None:
    group = Group(4)
    group.slow_R[:] = 0.0
    assert group.observe(30) == [1.0] * 4
