"""Bias, penalties and masks against their definitions and transformers' processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from moestro.protos.sequences import SamplingParams
from moestro.workers.sampling.penalties import edit_, edits
from moestro.workers.sampling.rows import SamplingRow

torch.set_num_threads(1)
V = 50


def row(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), (*prompt, *output), len(prompt), len(prompt) + len(output))


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 4


def edited(x: torch.Tensor, *rows: SamplingRow) -> torch.Tensor:
    out = x.clone()
    edit_(out, rows)
    return out


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 7.0])
def test_repetition_equals_transformers(penalty: float) -> None:
    x, prompt, output = logits(), (3, 3, 7, 40), (7, 11, 49, 0)
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), x.clone())
    assert torch.equal(edited(x, row(prompt, output, repetition_penalty=penalty)), want)


def test_presence_and_frequency_count_output_tokens_alone() -> None:
    x, prompt, output = logits(), (1, 2, 2), (5, 5, 5, 2, 9)
    want = x.clone()
    for token in set(output):
        want[0, token] -= 0.25 * output.count(token)
        want[0, token] -= 1.5
    got = edited(x, row(prompt, output, presence_penalty=1.5, frequency_penalty=0.25))
    assert torch.equal(got, want)
    assert torch.equal(edited(x, row(prompt, (), presence_penalty=1.5)), x)


def test_negative_penalties_encourage() -> None:
    x = torch.zeros(1, V)
    got = edited(x, row((), (4, 4), presence_penalty=-1.0, frequency_penalty=-0.5))
    assert float(got[0, 4]) == 2.0
    assert int((got != 0).sum()) == 1


def test_bias_comes_before_the_penalties() -> None:
    x = torch.full((1, V), -1.0)
    got = edited(x, row((6,), (), logit_bias={6: 5.0}, repetition_penalty=2.0))
    assert float(got[0, 6]) == 2.0  # (-1 + 5) / 2, and not -1 * 2 + 5


@pytest.mark.parametrize("produced", [0, 1, 2, 3, 4])
def test_min_tokens_equals_transformers(produced: int) -> None:
    x, prompt, output = logits(), (1, 2), tuple(range(10, 10 + produced))
    processor = MinNewTokensLengthLogitsProcessor(len(prompt), 3, [0, 8], device="cpu")
    want = processor(torch.tensor([prompt + output]), x.clone())
    got = edited(x, row(prompt, output, min_tokens=3, eos_token_ids=(0,), stop_token_ids=(8,)))
    assert torch.equal(got, want)


def test_no_bias_brings_a_masked_end_token_back() -> None:
    got = edited(logits(), row(min_tokens=1, eos_token_ids=(5,), logit_bias={5: 100.0}))
    assert float(got[0, 5]) == float("-inf")


def test_rows_are_edited_each_by_its_own() -> None:
    x = logits(5)
    rows = [
        row((1, 2), (3,), repetition_penalty=1.5),
        row((4,), (4, 5), frequency_penalty=0.5),
        row((9,), (9,)),
        row((), (1,), min_tokens=4, stop_token_ids=(0, 49), logit_bias={7: -2.0}),
        row((3,), (3, 4), repetition_penalty=0.7, presence_penalty=0.3, logit_bias={0: 1.0, 49: 2.0}),
    ]
    batch = edited(x, *rows)
    for r, one in enumerate(rows):
        assert torch.equal(batch[r : r + 1], edited(x[r : r + 1], one))
    assert torch.equal(batch[2], x[2])
    assert [edits(one) for one in rows] == [True, True, False, True, True]


def test_ids_outside_the_vocabulary_touch_no_neighbour() -> None:
    x = logits(3)
    outside = (V, V + 3, -1)
    middle = row(
        outside,
        outside,
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        logit_bias=dict.fromkeys(outside, 9.0),
        min_tokens=9,
        eos_token_ids=outside,
    )
    assert torch.equal(edited(x, row(), middle, row()), x)
