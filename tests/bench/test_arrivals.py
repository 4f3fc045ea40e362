"""Arrival processes against the definitions of the distributions they claim to be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.bench.arrivals import MOST_REQUESTS, Burst, ClosedLoop, Extent, OpenLoop, Replay, arrival_times
from moestro.protos.errors import ConfigError

N = 4000


def gaps(rate: float, cv: float, seed: int) -> np.ndarray:
    return np.diff((0.0, *arrival_times(OpenLoop(rate, cv), Extent(N), seed)))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.5, 40.0])
@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_gaps_have_the_mean_and_variation_asked_for(rate, cv, seed):
    x = gaps(rate, cv, seed)
    assert abs(x.mean() - 1 / rate) < 5 * cv / rate / math.sqrt(N), f"seed {seed}"
    # Standard error of the sample variance of a gamma: var * sqrt((kurtosis - 1) / n), kurtosis = 3 + 6 cv^2.
    variance = (cv / rate) ** 2
    assert abs(x.var() - variance) < 5 * variance * math.sqrt((2 + 6 * cv**2) / N), f"seed {seed}"


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_poisson_gaps_are_exponential(seed):
    rate = 7.0
    x = np.sort(gaps(rate, 1.0, seed))
    expected = 1 - np.exp(-rate * x)
    distance = max(np.abs(np.arange(1, N + 1) / N - expected).max(), np.abs(np.arange(N) / N - expected).max())
    assert distance < 1.95 / math.sqrt(N), f"seed {seed}: Kolmogorov-Smirnov distance {distance}"  # p = 0.001


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_poisson_gaps_have_no_memory(seed):
    x = gaps(7.0, 1.0, seed)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(N), f"seed {seed}"


def test_cv_of_zero_is_a_metronome():
    assert arrival_times(OpenLoop(4.0, 0.0), Extent(5), 0) == pytest.approx((0.25, 0.5, 0.75, 1.0, 1.25))


@settings(deadline=None, max_examples=50)
@given(
    rate=st.floats(0.1, 1000),
    cv=st.floats(0, 5),
    seed=st.integers(0, 2**63 - 1),
    short=st.integers(1, 50),
    more=st.integers(0, 50),
)
def test_same_seed_same_times_and_a_longer_run_only_adds(rate, cv, seed, short, more):
    load = OpenLoop(rate, cv)
    times = arrival_times(load, Extent(short + more), seed)
    assert arrival_times(load, Extent(short), seed) == times[:short]
    assert len(times) == short + more
    assert all(a <= b for a, b in pairwise(times))


def test_other_seed_other_times():
    assert arrival_times(OpenLoop(1.0), Extent(10), 1) != arrival_times(OpenLoop(1.0), Extent(10), 2)


def test_a_duration_keeps_the_arrivals_before_it():
    load = OpenLoop(50.0)
    all_times = arrival_times(load, Extent(400), 9)
    assert arrival_times(load, Extent(None, 2.0), 9) == tuple(t for t in all_times if t < 2.0)
    assert arrival_times(load, Extent(10, 2.0), 9) == all_times[:10]


def test_burst_and_replay():
    assert arrival_times(Burst(), Extent(3), 0) == (0.0, 0.0, 0.0)
    assert arrival_times(Replay((0.0, 0.5, 2.0)), Extent(None, 1.0), 0) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenLoop(0.0), r"--rate must be a finite number above 0, got 0"),
        (lambda: OpenLoop(math.nan), r"--rate .* got nan"),
        (lambda: OpenLoop(1.0, -0.5), r"--cv must be between 0 and 100, got -0.5"),
        (lambda: ClosedLoop(0), r"--concurrency must be between 1 and 100000, got 0"),
        (lambda: Extent(), r"--requests or --duration must be given"),
        (lambda: Extent(0), r"--requests must be between 1 and 1e\+06, got 0"),
        (lambda: Extent(None, -1.0), r"--duration .* got -1"),
        (lambda: arrival_times(OpenLoop(0.001, 0.0), Extent(None, 1.0), 0), r"--duration .* got 1 s and none arrived"),
        (lambda: arrival_times(OpenLoop(1e9, 0.0), Extent(None, 1.0), 0), rf"at or below {MOST_REQUESTS} requests"),
    ],
)
def test_bad_loads_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
