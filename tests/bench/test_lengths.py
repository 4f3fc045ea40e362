"""Length distributions: moments against their definitions, clipping, the spelling on the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.bench.lengths import parse_lengths
from moestro.protos.errors import ConfigError

N = 20_000


def draw(spec: str, seed: int) -> np.ndarray:
    return parse_lengths("--input", spec).sample(np.random.default_rng(seed), N)


def test_constant():
    assert set(draw("128", 0)) == {128}


@pytest.mark.parametrize("seed", [0, 1])
def test_uniform_takes_every_value_alike_and_both_ends(seed):
    values, counts = np.unique(draw("uniform:min=3,max=12", seed), return_counts=True)
    assert list(values) == list(range(3, 13))
    chi_square = ((counts - N / 10) ** 2 / (N / 10)).sum()
    assert chi_square < 27.9, f"seed {seed}"  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", [0, 1])
def test_normal_moments(seed):
    x = draw("normal:mean=500,std=40", seed)
    assert abs(x.mean() - 500) < 5 * 40 / math.sqrt(N), f"seed {seed}"
    assert abs(x.std() - 40) < 5 * 40 / math.sqrt(2 * N), f"seed {seed}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cv", [0.25, 1.0])
def test_lognormal_is_given_by_the_moments_of_the_lengths(cv, seed):
    x = draw(f"lognormal:mean=1000,cv={cv}", seed)
    assert abs(x.mean() - 1000) < 5 * 1000 * cv / math.sqrt(N), f"seed {seed}"
    logs = np.log(x)
    sigma = math.sqrt(math.log(1 + cv**2))
    assert abs(logs.std() - sigma) < 5 * sigma / math.sqrt(2 * N) + 2e-3, f"seed {seed}"  # 2e-3: whole tokens
    assert abs(np.median(x) / (1000 / math.sqrt(1 + cv**2)) - 1) < 0.05, f"seed {seed}"


@settings(deadline=None)
@given(
    mean=st.integers(1, 2000),
    cv=st.floats(0, 5),
    low=st.integers(1, 500),
    width=st.integers(0, 500),
    seed=st.integers(0, 2**32),
)
def test_draws_stay_inside_the_bounds(mean, cv, low, width, seed):
    for spec in (f"lognormal:mean={mean},cv={cv}", f"normal:mean={mean},std={mean * cv}"):
        lengths = parse_lengths("--input", f"{spec},min={low},max={low + width}")
        x = lengths.sample(np.random.default_rng(seed), 100)
        assert low <= x.min() <= x.max() <= low + width
    assert (
        parse_lengths("--input", f"normal:mean={mean},std={mean * cv}").sample(np.random.default_rng(seed), 100).min()
        >= 1
    )


@pytest.mark.parametrize(
    "spec",
    [
        "7",
        "uniform:min=1,max=9",
        "normal:mean=20,std=3",
        "lognormal:mean=256,cv=1.5,max=1024",
        "normal:mean=5,std=0,min=2",
    ],
)
def test_a_distribution_can_be_read_back_from_its_name(spec):
    lengths = parse_lengths("--input", spec)
    assert parse_lengths("--input", str(lengths)) == lengths


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "--output must be a finite number, got ''"),
        ("0", "--output must be between 1 and 1e\\+07, got 0"),
        ("-5", "--output must be between 1 .* got -5"),
        ("1.5", "--output must be a whole number, got '1.5'"),
        ("nan", "--output must be a finite number, got 'nan'"),
        ("zipf:mean=3", "one of uniform, normal, lognormal, got 'zipf'"),
        ("uniform:min=5", "uniform needs max"),
        ("uniform:min=5,max=4", "min must not exceed max, got min=5, max=4"),
        ("uniform:min=5,max=9,cv=1", "uniform takes min, max, got 'cv'"),
        ("normal:mean=5,std=-1", "--output std must be at least 0, got -1"),
        ("lognormal:mean=0,cv=1", "--output mean must be between 1 .* got 0"),
        ("lognormal:mean=9,cv=x", "--output cv must be a finite number, got 'x'"),
        ("lognormal:mean=9,mean=8,cv=1", "--output gives mean twice"),
        ("normal:5", "--output must be name=value pairs .* got '5'"),
    ],
)
def test_bad_lengths_are_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_lengths("--output", spec)
