"""Which rows are told to be no numbers."""

from __future__ import annotations

import pytest
import torch

from moestro.workers.health import StepHealth

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("numbers", "bad"),
    [
        ({}, []),
        ({(3, 0): NAN}, [3]),
        ({(0, 5): NAN, (6, 7): NAN, (2, 1): 1e30}, [0, 6]),
        ({(1, 0): INF, (2, 0): -INF}, [1, 2]),
        ({(1, 0): 3e38, (1, 1): 3e38, (2, 0): -3e38, (2, 1): -3e38}, []),  # whose sums are not finite, but they are
        ({(1, 0): INF, (1, 3): -INF, (4, 2): NAN}, [1, 4]),
    ],
)
def test_bad_rows(numbers: dict[tuple[int, int], float], bad: list[int], dtype: torch.dtype) -> None:
    x_TM = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place, number in numbers.items():
        x_TM[place] = number
    health = StepHealth()
    health.saw_result(x_TM)
    assert health.bad_rows() == bad


def test_a_step_of_no_tokens_is_healthy() -> None:
    health = StepHealth()
    assert health.bad_rows() == []
    health.saw_result(torch.empty(0, 8))
    assert health.bad_rows() == []
