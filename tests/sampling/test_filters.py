"""top_k, min_p and top_p: properties, ties, and transformers' warpers as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moestro.workers.sampling.filters import OFF_TOP_P, log_min_p, surviving
from moestro.workers.sampling.ordering import ranked

torch.set_num_threads(1)


def kept(x_V: Tensor, top_k: int = 0, min_p: float = 0.0, top_p: float = 1.0) -> set[int]:
    """The surviving ids of one row, all of it ranked."""
    y_1V, id_1V = ranked((x_V - x_V.max())[None], len(x_V))
    keep_1V = surviving(
        y_1V,
        torch.tensor([top_k or len(x_V)]),
        torch.tensor([log_min_p(min_p)], dtype=torch.float32),
        torch.tensor([top_p if top_p < 1 else OFF_TOP_P], dtype=torch.float64),
    )
    return set(id_1V[keep_1V].tolist())


def random_logits(seed: int, size: int = 500) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 1), ("top_k", 7), ("top_k", 500), ("min_p", 0.01), ("min_p", 0.3), ("top_p", 0.05), ("top_p", 0.9)],
)
def test_kept_set_equals_transformers(seed: int, name: str, value: float) -> None:
    x = random_logits(seed)
    warper = {"top_k": TopKLogitsWarper, "min_p": MinPLogitsWarper, "top_p": TopPLogitsWarper}[name](value)
    scores = warper(torch.zeros(1, 1, dtype=torch.long), x[None].clone())[0]
    assert kept(x, **{name: value}) == set(scores.isfinite().nonzero().flatten().tolist()), f"seed {seed}"


@pytest.mark.parametrize("seed", range(5))
def test_filters_in_order_equal_transformers_chain(seed: int) -> None:
    x = random_logits(seed)
    scores = x[None].clone()
    for warper in (TopKLogitsWarper(40), MinPLogitsWarper(0.02), TopPLogitsWarper(0.8)):
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    assert kept(x, 40, 0.02, 0.8) == set(scores[0].isfinite().nonzero().flatten().tolist()), f"seed {seed}"


rows = st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -math.inf]), min_size=1, max_size=30).filter(
    lambda values: max(values) > -math.inf
)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(0, 30), st.floats(0, 1), st.floats(0.0001, 1))
@example([0.0, 0.0, 0.0, -(2.0**-24), 0.0, 1.0], 5, 0.0, 1.0)
def test_properties(values: list[float], top_k: int, min_p: float, top_p: float) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    top_k = min(top_k, len(values))
    # The order is that of the tempered logits, which are what is filtered: two logits may become equal when the largest
    # is taken off them.
    y = x - x.max()
    order = sorted(range(len(values)), key=lambda token: (-float(y[token]), token))
    survivors = kept(x, top_k, min_p, top_p)
    # A prefix of the order survives, never nothing, and never more than top_k.
    assert survivors == set(order[: len(survivors)])
    assert 1 <= len(survivors) <= (top_k or len(values))
    # Dropping or loosening a filter never removes a token.
    assert survivors <= kept(x, top_k, min_p) <= kept(x, top_k) <= kept(x)
    # top_p keeps the shortest prefix of enough mass (of what the other two left).
    left = order[: len(kept(x, top_k, min_p))]
    p = torch.softmax(x[left].double(), 0)
    assert float(p[: len(survivors)].sum()) >= min(top_p, 1) - 1e-6
    assert float(p[: len(survivors) - 1].sum()) <= top_p + 1e-6 or top_p == 1


@settings(max_examples=60, deadline=None)
@given(rows, st.floats(0.001, 1), st.floats(0.001, 1))
def test_more_mass_keeps_more(values: list[float], p: float, q: float) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert kept(x, top_p=min(p, q)) <= kept(x, top_p=max(p, q))
    assert kept(x, min_p=max(p, q)) <= kept(x, min_p=min(p, q))


def test_ties_go_to_the_smaller_id() -> None:
    x = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert kept(x, top_k=2) == {1, 2}
    assert kept(x, top_k=4) == {0, 1, 2, 3}
    assert kept(torch.zeros(10), top_p=0.25) == {0, 1, 2}
    assert kept(torch.zeros(10), min_p=1.0) == set(range(10))


def test_off_keeps_everything_but_impossible_tokens_cost_nothing() -> None:
    assert kept(random_logits(0)) == set(range(500))
    assert kept(torch.tensor([0.0, -200.0, -1.0])) == {0, 1, 2}


def test_survivors_do_not_depend_on_neighbours() -> None:
    x = torch.stack([random_logits(seed) for seed in range(9)])
    y, ids = ranked(x - x.amax(1, keepdim=True), 500)
    top_p = torch.linspace(0.1, 0.99, 9, dtype=torch.float64)
    least = torch.full((9,), -math.inf)
    batch = surviving(y, torch.full((9,), 500), least, top_p)
    for g in range(9):
        assert set(ids[g][batch[g]].tolist()) == kept(x[g], top_p=float(top_p[g]))
