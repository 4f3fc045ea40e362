"""A rank that is slow at the same work is named, and nobody else ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moestro.router.stragglers import JUDGEMENTS, LEAST_S, Stragglers, Work

STEP_S, ROW_S, TOKEN_S, KEY_S, EVERY_S = 2e-4, 2e-5, 1e-4, 1e-6, 2.0


class Group:
    """Ranks whose time is concave in their rows, as where weights are read once a step."""

    def __init__(self, num_ranks: int, seed: int = 0, noise: float = 0.1) -> None:
        self.noise, self.random, self.now = noise, np.random.default_rng(seed), 0.0
        self.stragglers = Stragglers(num_ranks)
        self.slow_R = np.ones(num_ranks)
        self.rows_R = np.full(num_ranks, 40.0)  # of a step, in the mean; so the rest
        self.tokens_R = np.full(num_ranks, 4.0)
        self.blocks_R = np.full(num_ranks, 30.0)
        self.steps = 200

    def observe(self, count: int = 1) -> list[float]:
        for _ in range(count):
            self.now += EVERY_S
            rows_R, tokens_R, blocks_R = (
                self.random.poisson(mean_R * self.steps) for mean_R in (self.rows_R, self.tokens_R, self.blocks_R)
            )
            keys_R = tokens_R * blocks_R / self.steps
            seconds_R = (
                self.steps * (STEP_S + ROW_S * (rows_R / self.steps) ** 0.8) + TOKEN_S * tokens_R + KEY_S * keys_R
            )
            seconds_R *= self.slow_R * self.random.lognormal(0.0, self.noise, len(rows_R))
            self.stragglers.observe(
                [Work(*numbers) for numbers in zip(tokens_R, rows_R, blocks_R, seconds_R.tolist(), strict=True)]
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
    assert named[1] == pytest.approx(slow, rel=0.4)
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


def test_what_one_rank_took_bounds_what_another_may_take() -> None:
    one = Work(tokens=10, rows=100, kv_blocks=50, own_s=1.0)
    assert one.bound_s(one) == 1.0
    assert one.bound_s(Work(20, 100, 50, 0.0)) == 2.0
    assert one.bound_s(Work(20, 100, 100, 0.0)) == 4.0
    assert one.bound_s(Work(10, 700, 50, 0.0)) == 7.0
    assert one.bound_s(Work(1, 2, 3, 0.0)) == 1.0
    assert one.bound_s(Work(0, 0, 0, 0.0)) == 1.0
    assert Work(0, 100, 0, 1.0).bound_s(Work(0, 200, 0, 0.0)) == 2.0
    assert Work(0, 100, 0, 1.0).bound_s(one) is None  # who has no tokens says nothing of tokens


@pytest.mark.parametrize("kind", ["rows_R", "tokens_R", "blocks_R", "all"])
@pytest.mark.parametrize("numbers", [[400, 40, 40, 40], [4, 40, 40, 40], [0, 40, 40, 40], [1, 10, 100, 1000]])
def test_whoever_has_more_to_do_is_not_slow(kind: str, numbers: list[int]) -> None:
    group = Group(4)
    for name in ("rows_R", "tokens_R", "blocks_R") if kind == "all" else (kind,):
        setattr(group, name, np.array(numbers, dtype=float))
    assert group.observe(40) == [1.0] * 4


def test_a_slow_rank_without_sequences_is_named_too() -> None:
    group = Group(3)
    group.tokens_R[1] = group.blocks_R[1] = 0.0
    group.slow_R[1] = 20.0
    assert group.observe(10)[1] > 1.5


def burst(group: Group) -> None:
    """Now and then one observation of one rank is far out of line."""
    group.slow_R[:] = 1.0
    if group.random.random() < 0.3:
        group.slow_R[group.random.integers(len(group.slow_R))] = 20.0


def drift(group: Group) -> None:
    """What there is to do wanders."""
    for mean_R in (group.rows_R, group.tokens_R, group.blocks_R):
        mean_R *= group.random.lognormal(0.0, 0.2, len(mean_R))
        np.clip(mean_R, 0.1, 2000, out=mean_R)


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
    assert STEP_S + 40 * ROW_S + 4 * TOKEN_S < LEAST_S
    assert group.observe(50) == [1.0, 1.0]


def test_a_rank_alone_is_never_slow() -> None:
    group = Group(1)
    assert group.observe(30) == [1.0]


def test_a_device_whose_time_the_host_does_not_see_says_nothing() -> None:
    group = Group(4)
    group.slow_R[:] = 0.0
    assert group.observe(30) == [1.0] * 4
