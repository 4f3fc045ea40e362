"""Log probabilities against log_softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.workers.sampling import logprobs
from moestro.workers.sampling.logprobs import prompt_logprobs

torch.set_num_threads(1)


@pytest.mark.parametrize("k", [0, 1, 5, 20, 60])
def test_prompt_logprobs_are_the_log_softmax(k: int) -> None:
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(k)) * 4
    ids = [0, 39, 3, 3, 17, 20, 1]
    want = torch.log_softmax(x.double(), 1)
    for t, got in enumerate(prompt_logprobs(x, ids, k)):
        assert got.token_id == ids[t]
        assert math.isclose(got.logprob, float(want[t, ids[t]]), abs_tol=1e-5)
        order = sorted(range(40), key=lambda token: (-float(x[t, token]), token))[:k]
        assert [token for token, _ in got.top] == order
        assert all(math.isclose(v, float(want[t, token]), abs_tol=1e-5) for token, v in got.top)


def test_equal_ones_by_id() -> None:
    (got,) = prompt_logprobs(torch.tensor([[0.0, 2.0, 2.0, 0.0, 2.0]]), [0], 4)
    assert [token for token, _ in got.top] == [1, 2, 4, 0]


def test_portions_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(9)
    whole = prompt_logprobs(x, ids, 3)
    monkeypatch.setattr(logprobs, "_ELEMENTS_AT_ONCE", 70)
    assert prompt_logprobs(x, ids, 3) == whole
    assert tuple(prompt_logprobs(x[t : t + 1], [t], 3)[0] for t in range(9)) == whole


def test_minus_infinity_is_a_value_and_nan_stays_in_its_row() -> None:
    x = torch.tensor([[0.0, -math.inf], [math.nan, 0.0], [0.0, 0.0]])
    first, second, third = prompt_logprobs(x, [1, 0, 0], 2)
    assert first.logprob == -math.inf
    assert first.top == ((0, 0.0), (1, -math.inf))
    assert math.isnan(second.logprob)
    assert math.isclose(third.logprob, -math.log(2), abs_tol=1e-6)


def test_nothing_asked_nothing_given() -> None:
    assert prompt_logprobs(torch.zeros(0, 5), [], 3) == ()


@pytest.mark.parametrize(("ids", "k", "field"), [([0], 1, "next_id_T"), ([0, 5], 1, "next_id_T"), ([0, 1], -1, "k")])
def test_refuses(ids: list[int], k: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        prompt_logprobs(torch.zeros(2, 5), ids, k)
