"""The sampler: greedy, errors, independence of neighbours, distributions, log probabilities, and what it costs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sampling.statistics import chi_square_fits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moestro.protos.sequences import SampledToken, SamplingParams
from moestro.workers.sampling.greedy import coded, largest
from moestro.workers.sampling.logprobs import prompt_logprobs
from moestro.workers.sampling.sampler import SamplingRow, sample

torch.set_num_threads(1)


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), position: int = 0, **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), (*prompt, *output), len(prompt), position)


def logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def draws(x_V: Tensor, count: int, prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any) -> Tensor:
    """Tokens drawn from the same logits at ``count`` successive positions."""
    one = row(prompt, output, **params)
    tokens: list[int] = []
    for start in range(0, count, 2000):
        rows = [one._replace(position=start + r) for r in range(2000)]
        tokens += [token.token_id for token in sample(x_V.expand(2000, -1), rows)]
    return torch.tensor(tokens[:count])


def test_greedy_is_the_argmax_with_the_smallest_id() -> None:
    x = logits(20, 300)
    x[3, [7, 99, 200]] = 50.0
    got = sample(x, [row(temperature=0.0) for _ in range(20)])
    assert [token.token_id for token in got] == [
        max(range(300), key=lambda i, r=r: (float(x[r, i]), -i)) for r in range(20)
    ]
    assert got[3] == SampledToken(7)


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 5), []) == []


def random_params(rng: random.Random) -> dict[str, Any]:
    pick = rng.choice
    return {
        "temperature": pick([0.0, 1e-40, 0.3, 1.0, 2.5]),
        "top_k": pick([0, 0, 1, 5, 40, 1000]),
        "top_p": pick([1.0, 1.0, 0.3, 0.9]),
        "min_p": pick([0.0, 0.0, 0.1, 1.0]),
        "repetition_penalty": pick([1.0, 1.0, 1.4]),
        "presence_penalty": pick([0.0, 0.0, 0.8]),
        "frequency_penalty": pick([0.0, 0.0, -0.3]),
        "logit_bias": pick([{}, {3: 4.0, 70: -100.0}]),
        "min_tokens": pick([0, 9]),
        "eos_token_ids": (rng.randrange(131),),
        "seed": rng.getrandbits(64),
        "logprobs": pick([None, None, 0, 4]),
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_row_is_a_pure_function_of_itself(seed: int) -> None:
    """Alone, in a batch, in another order, beside broken rows: the same token and the same log probabilities."""
    rng = random.Random(seed)
    count, vocab_size = 24, 131
    x = logits(count, vocab_size, seed)
    rows = []
    for _ in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(1, 20)))
        output = tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(12)))
        rows.append(row(prompt, output, len(prompt) + len(output), **random_params(rng)))
    before = x.clone()
    alone = [sample(x[r : r + 1], [rows[r]])[0] for r in range(count)]
    assert sample(x, rows) == alone, f"seed {seed}"
    assert torch.equal(x, before)
    order = rng.sample(range(count), count)
    assert sample(x[order], [rows[r] for r in order]) == [alone[r] for r in order], f"seed {seed}"
    broken = list(range(0, count, 3))
    x[broken] = math.nan
    got = sample(x, rows)
    for r in range(count):
        assert (got[r].error is not None) if r in broken else (got[r] == alone[r]), f"seed {seed}, row {r}"


def test_seed_and_position_decide_and_nothing_else() -> None:
    x = torch.zeros(1, 5000)
    first = sample(x, [row(seed=1, position=5)])
    assert sample(x, [row((1, 2, 3), (4,), seed=1, position=5)]) == first
    assert sample(x, [row(seed=2, position=5)]) != first
    assert sample(x, [row(seed=1, position=6)]) != first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("extra", [{}, {"top_k": 3}, {"top_p": 0.5, "logprobs": 2}, {"logit_bias": {1: 1.0}}])
def test_bad_logits_end_their_row_alone(temperature: float, extra: dict[str, Any]) -> None:
    x = logits(6, 40)
    good = sample(x, [row(temperature=temperature, **extra)] * 6)
    x[1, 5] = math.nan
    x[2, 6] = math.inf
    x[3] = -math.inf
    x[4, 0], x[4, 1] = math.inf, math.nan
    got = sample(x, [row(temperature=temperature, **extra)] * 6)
    assert (got[0], got[5]) == (good[0], good[5])
    for r, word in ((1, "NaN"), (2, "+Inf"), (3, "all -Inf"), (4, "NaN")):
        error = got[r].error
        assert error is not None
        assert word in error
        assert (got[r].token_id, got[r].logprobs) == (-1, None)


def test_some_minus_infinity_is_no_error_and_never_drawn() -> None:
    x = torch.full((1, 64), -math.inf)
    x[0, [3, 60]] = torch.tensor([0.0, -1.0])
    for params in ({}, {"top_p": 0.99}, {"top_k": 20}, {"min_p": 0.01}, {"temperature": 50.0}):
        assert set(draws(x[0], 2000, **params).tolist()) == {3, 60}


def test_parameters_that_leave_no_token_are_an_error_of_their_row() -> None:
    x = torch.zeros(2, 3)
    banned = row(min_tokens=1, eos_token_ids=(0, 1), stop_token_ids=(2,))
    first, second = sample(x, [banned, row(temperature=0.0)])
    assert first.error is not None
    assert "min_tokens" in first.error
    assert second == SampledToken(0)


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"repetition_penalty": 1.8},
    {"temperature": 1.3, "top_k": 12, "min_p": 0.02, "top_p": 0.9, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, Any]) -> None:
    x, prompt, output, count = logits(1, 60, 4, 1.5), (1, 2, 3), (3, 4), 20_000
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.get("repetition_penalty", 1.0))])
    chain.append(TemperatureLogitsWarper(params.get("temperature", 1.0)))
    if "top_k" in params:
        chain.append(TopKLogitsWarper(params["top_k"]))
    chain.append(MinPLogitsWarper(params.get("min_p", 0.0)))
    if "top_p" in params:
        chain.append(TopPLogitsWarper(params["top_p"]))
    p = torch.softmax(chain(torch.tensor([prompt + output]), x.clone())[0].double(), 0)
    tokens = draws(x[0], count, prompt, output, seed=11, **params)
    counts = torch.bincount(tokens, minlength=60)
    assert int(counts[p == 0].sum()) == 0
    assert chi_square_fits(counts[p > 0], p[p > 0] * count)


def test_draws_at_successive_positions_are_independent() -> None:
    tokens = draws(torch.zeros(8), 20_000, seed=3)
    pairs = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64)
    assert chi_square_fits(pairs, torch.full((64,), 19_999 / 64))


def test_draws_over_seeds_follow_the_softmax() -> None:
    x = logits(1, 30, 2, 1.0)
    rows = [row(seed=seed, position=17) for seed in range(8000)]
    tokens = torch.tensor([token.token_id for token in sample(x.expand(8000, -1), rows)])
    assert chi_square_fits(torch.bincount(tokens, minlength=30), torch.softmax(x[0].double(), 0) * 8000)


def test_filters_that_keep_all_change_no_token() -> None:
    """The ranked path and the unranked one draw with the same noise."""
    x = logits(1, 200, 6)[0]
    plain = draws(x, 2000, seed=9)
    assert torch.equal(plain, draws(x, 2000, seed=9, top_k=199, logit_bias={}))
    assert torch.equal(plain, draws(x, 2000, seed=9, top_k=200))
    assert torch.equal(plain, draws(x, 2000, seed=9, top_p=1 - 1e-9))


def test_bias_bans_and_forces() -> None:
    x = logits(1, 100, 1)[0]
    favourite = int(x.argmax())
    assert favourite not in draws(x, 2000, logit_bias={favourite: -100.0}).tolist()
    assert set(draws(x, 2000, logit_bias={50: 100.0}).tolist()) == {50}


def test_low_temperature_nears_greedy_and_never_overflows() -> None:
    x = logits(1, 100, 3, 1e30)[0]
    for temperature in (1e-3, 1e-30, 1e-45):
        assert set(draws(x, 2000, temperature=temperature).tolist()) == {int(x.argmax())}


def test_min_tokens_holds_the_end_back_then_lets_it_go() -> None:
    x = torch.zeros(1, 10)
    x[0, 2] = 9.0
    early = row((1,), (5,), temperature=0.0, min_tokens=2, eos_token_ids=(2,))
    assert sample(x, [early])[0].token_id == 0
    assert sample(x, [early._replace(token_ids=(1, 5, 5))])[0].token_id == 2


def test_logprobs_are_of_the_raw_logits() -> None:
    x = logits(4, 50, 8)
    params = {"temperature": 0.2, "top_k": 3, "repetition_penalty": 3.0, "logit_bias": {4: 100.0}}
    rows = [row((1,), (2,), logprobs=k, **params) for k in (0, 3, 20)] + [row(temperature=0.0)]
    got = sample(x, rows)
    assert [token.token_id for token in got[:3]] == [4, 4, 4]
    assert got[3].logprobs is None
    for r, k in enumerate((0, 3, 20)):
        assert got[r].logprobs == prompt_logprobs(x[r : r + 1], [4], k)[0]


@pytest.mark.parametrize(
    ("x", "count", "word"),
    [
        (torch.zeros(3), 3, "shape"),
        (torch.zeros(3, 0), 3, "shape"),
        (torch.zeros(3, 5, dtype=torch.float64), 3, "float32"),
        (torch.zeros(3, 5), 2, "rows"),
    ],
)
def test_refuses(x: Tensor, count: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        sample(x, [row()] * count)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operations(x: Tensor, rows: list[SamplingRow]) -> list[str]:
    with _Operations() as seen:
        sample(x, rows)
    return seen.names


def test_an_all_greedy_batch_is_one_argmax_however_large() -> None:
    small = operations(logits(1, 30), [row(temperature=0.0)])
    large = operations(logits(64, 30), [row(temperature=0.0)] * 64)
    assert small == large
    assert len(large) < 20
    with _Operations() as seen:
        coded(*largest(torch.empty(64, 30, device="meta")))
    assert seen.names.count("aten::argmax") == 1
    assert len(seen.names) < 20


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_logit_on_a_cpu_is_torchs(seed: int) -> None:
    """Ties, both zeros, infinities and NaN in every place, rows that do not lie one after another."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan])
    for x_RV in (
        values[torch.randint(5, (64, 37), generator=generator)],
        values[torch.randint(8, (64, 37), generator=generator)],
        values[torch.randint(8, (37, 64), generator=generator)].T,
        torch.full((2, 5), -torch.inf),
        torch.randn(3, 8192, generator=generator),
    ):
        best_R, id_R = largest(x_RV)
        expected_R = x_RV.argmax(dim=1)
        assert torch.equal(id_R, expected_R)
        torch.testing.assert_close(best_R, x_RV.gather(1, expected_R[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)
        bad_R = x_RV.isnan().any(1) | (x_RV == torch.inf).any(1) | (x_RV == -torch.inf).all(1)
        assert torch.equal(coded(best_R, id_R) < 0, bad_R)


def test_no_operation_waits_for_the_device_before_the_result() -> None:
    """Of the operations that make a host wait on an accelerator (a scalar read, or indices of unknown number) none is
    used, whatever the parameters."""
    everything = replace(
        SamplingParams(),
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        logit_bias={3: 1.0},
        min_tokens=9,
        eos_token_ids=(1,),
        logprobs=3,
    )
    rows = [SamplingRow(everything, (1, 2, 3), 2, 3), row(), row(top_p=0.5), row(temperature=0.0)]
    names = operations(logits(4, 64), rows)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
    assert not [name for name in names if name.split("::")[1].split(".")[0] in waiting]


def test_rows_pay_only_for_what_they_ask() -> None:
    names = operations(logits(3, 64), [row(), row(temperature=0.7), row(temperature=0.0)])
    ranked_or_massed = ("aten::cumsum", "aten::exp", "aten::exp_", "aten::sort", "aten::topk")
    assert not [name for name in names if name.split(".")[0] in ranked_or_massed]
    assert not [name for name in names if "softmax" in name or "scatter" in name]
