"""The suite: the same for a seed, within every bound, and of every kind."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cluster.client_results import ModelInfo
from moestro.cluster.verify.suite import Case, build_suite, filler


def model(vocab_size: int = 300, max_context: int = 1024, chats: bool = True) -> ModelInfo:
    return ModelInfo("m", "A", max_context, vocab_size, "float32", chats)


TEXT_IDS = ([1, 2, 3] * 30, [4, 5] * 40)


def test_a_seed_is_the_whole_of_it() -> None:
    assert build_suite(model(), TEXT_IDS, 16, 7) == build_suite(model(), TEXT_IDS, 16, 7)
    assert build_suite(model(), TEXT_IDS, 16, 7) != build_suite(model(), TEXT_IDS, 16, 8)
    assert build_suite(model(), TEXT_IDS, 16, 7)[:5] == build_suite(model(), TEXT_IDS, 5, 7)


@pytest.mark.parametrize("chats", [True, False])
def test_every_kind_is_there(chats: bool) -> None:
    cases = build_suite(model(chats=chats), TEXT_IDS, 16, 0)
    options = [case.options for case in cases]
    assert any(o["temperature"] == 0 for o in options)
    assert any(o["temperature"] > 0 and "top_p" in o for o in options)
    assert any("repetition_penalty" in o for o in options)
    assert any("min_p" in o for o in options)
    assert {o.get("n", 1) for o in options} == {1, 2, 3}
    assert any("logprobs" not in o for o in options)
    assert [isinstance(case.prompt, str) for case in cases].count(True) == (2 if chats else 0)
    computed = ["prompt_logprobs" in o for o in options]
    assert computed.count(True) == 12  # these compute their whole prompt each time
    assert len({case.name for case in cases}) == 16
    prompts = [case.prompt for case in cases if isinstance(case.prompt, tuple)]
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 16 < lengths[-1], "shorter than a block, and several blocks long"
    assert any(a[:16] == b[:16] for a, b in pairwise(sorted(p for p in prompts if len(p) > 16))), "no shared prefix"


@given(st.integers(1, 400), st.integers(4, 5000), st.integers(0, 2**32), st.booleans())
def test_it_fits_any_model(vocab_size: int, max_context: int, seed: int, chats: bool) -> None:
    described = model(vocab_size, max_context, chats)
    texts = [[t % vocab_size for t in text] for text in TEXT_IDS]
    rng = random.Random(seed)
    for case in (*build_suite(described, texts, 9, seed), filler(described, rng)):
        if isinstance(case.prompt, str):
            assert case.prompt
            continue
        assert len(case.prompt) >= 1
        assert all(0 <= token < vocab_size for token in case.prompt)
        assert 1 <= case.options["max_tokens"] <= max_context - len(case.prompt)


def test_without_prompt_logprobs_nothing_else_changes() -> None:
    case = Case("a", (1,), {"n": 2, "prompt_logprobs": 3, "seed": 4})
    assert case.without_prompt_logprobs() == Case("a", (1,), {"n": 2, "seed": 4})
    assert case.options["prompt_logprobs"] == 3
