"""Goodness of fit without scipy. Thresholds are of a false alarm about once in a million, and all tests are seeded."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square_fits(counts: Tensor, expected: Tensor) -> bool:
    """Pearson's test of counts against expected counts (cells of fewer than 5 are merged into one)."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    large = expected >= 5
    rest = expected[~large].sum()
    observed_cells, expected_cells = counts[large], expected[large]
    if rest >= 5:
        observed_cells = torch.cat([observed_cells, counts[~large].sum()[None]])
        expected_cells = torch.cat([expected_cells, rest[None]])
    statistic = float(((observed_cells - expected_cells) ** 2 / expected_cells).sum())
    freedom = len(expected_cells) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square over its degrees of freedom is nearly normal.
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return z < 4.9


def kolmogorov_smirnov_fits(uniforms: Tensor) -> bool:
    """The one-sample test against the uniform distribution on (0, 1), by the asymptotic tail 2 exp(-2 n d^2)."""
    x = uniforms.double().flatten().sort().values
    n = len(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum((steps[1:] - x).max(), (x - steps[:-1]).max()))
    return 2 * math.exp(-2 * n * distance**2) > 1e-6


def uncorrelated(a: Tensor, b: Tensor) -> bool:
    pair = torch.stack([a.double().flatten(), b.double().flatten()])
    return abs(float(torch.corrcoef(pair)[0, 1])) * math.sqrt(pair.shape[1]) < 4.9
