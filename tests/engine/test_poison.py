"""A sequence whose numbers are not numbers fails alone: beside it, and after it in the same blocks, nothing changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.protos.sequences import FinishReason, SamplingParams, SequenceRequest
from moestro.workers.engine import Engine
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

POISON = 7  # the embedding of this token id is not finite
NEIGHBOURS = {"a": [3, 5, 11, 2], "b": [9, 4]}
NAN, INF = float("nan"), float("inf")


def save(name: str, poison: float, folder: Path, **options: object) -> Path:
    torch.set_num_threads(1)
    model = make_model(name, seed=21, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = poison
    return save_model(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", NAN, tmp_path_factory.mktemp("poisoned"))


def engine(folder: Path, dtype: torch.dtype | None = None) -> Engine:
    """With few blocks, so that those of an ended sequence are soon used again."""
    model = load_model(folder, dtype=dtype)
    block_bytes = model.cache_spec.bytes_per_block(0, 4)
    return build_engine(
        RankSpec(model="", kv_bytes=13 * block_bytes, block_size=4, max_num_sequences=4, max_num_tokens=32),
        model,
        torch.device("cpu"),
    )


def run(
    engine: Engine, prompts: dict[str, list[int]], temperature: float = 0.0
) -> dict[str, tuple[list[int], FinishReason | None]]:
    ended: dict[str, tuple[list[int], FinishReason | None]] = {name: ([], None) for name in prompts}
    for name, prompt in prompts.items():
        sampling = SamplingParams(
            temperature=temperature, seed=3, max_tokens=12, ignore_eos=True, logit_bias={POISON: -100.0}
        )
        assert engine.add(SequenceRequest(name, tuple(prompt), sampling), 0.0) is None
    while engine.has_work:
        for delta in engine.step(time.monotonic):
            ended[delta.sequence_id][0].extend(delta.token_ids)
            ended[delta.sequence_id] = ended[delta.sequence_id][0], delta.finish_reason
        engine.scheduler.check_integrity()
    return ended


def test_it_fails_alone_and_leaves_nothing_behind(folder: Path) -> None:
    expected = run(engine(folder), NEIGHBOURS)
    poisoned = engine(folder)
    bad = [*random_ids(9, seed=1)[:9], POISON, 1, 2]
    for _ in range(3):
        together = run(poisoned, {"bad": bad, **NEIGHBOURS})
        assert together.pop("bad") == ([], FinishReason.ERROR)
        assert together == expected
        assert run(poisoned, NEIGHBOURS) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "options", "poison"),
    [
        ("qwen3_moe", {}, INF),
        ("mixtral", {"sliding_window": 6}, NAN),
        ("mixtral", {"sliding_window": 6}, -INF),
        ("qwen2_moe", {}, INF),
        ("dots1", {}, -INF),
    ],
)
def test_it_fails_alone_whatever_it_is_that_is_not_finite(
    name: str, options: dict[str, object], poison: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Greedy and sampled; with the fused stack, windows, shared experts, sigmoid scores, and plainly."""
    poisoned = engine(save(name, poison, tmp_path, **options), dtype)
    for temperature in (0.0, 1.0):
        expected = run(poisoned, NEIGHBOURS, temperature)
        together = run(poisoned, {"bad": [3, 5, POISON, 1, 2, 9], **NEIGHBOURS}, temperature)
        assert together.pop("bad") == ([], FinishReason.ERROR)
        assert together == expected
        assert run(poisoned, NEIGHBOURS, temperature) == expected


def spoil(engine: Engine, rows: int, row: int, value: float, part: str) -> list[int]:
    """The first step of ``rows`` rows gets a value in one row of what a part makes of them; the list then has one."""
    model = engine.runner.model  # type: ignore[attr-defined]
    at = {"mixture": model.layers[-1].mlp.mixture.bank.experts, "head": model.head}[part]
    method = {"mixture": "mix", "head": "forward"}[part]
    healthy, spoilt = getattr(at, method), []

    class Spoilt(type(at)):  # type: ignore[misc]
        __slots__ = ()

    def call(self: object, x: torch.Tensor, *others: torch.Tensor) -> object:
        result = healthy(x, *others)
        y = result[0] if isinstance(result, tuple) else result
        if x.shape[0] == rows and not spoilt:
            spoilt.append(row)
            y[row, 1] = value
        return result

    setattr(Spoilt, method, call)
    object.__setattr__(at, "__class__", Spoilt)
    return spoilt


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_after_the_last_layer_fails_one_request(
    folder: Path, value: float, temperature: float
) -> None:
    """In the first of two chunks, whose logits nobody wants: a NaN that is made there never comes any further."""
    poisoned = engine(folder, torch.float32)
    expected = run(poisoned, NEIGHBOURS, temperature)
    spoilt = spoil(poisoned, 32, 5, value, "mixture")
    assert run(poisoned, {"bad": random_ids(40, seed=4)}, temperature) == {"bad": ([], FinishReason.ERROR)}
    assert spoilt
    assert run(poisoned, NEIGHBOURS, temperature) == expected


@pytest.mark.parametrize("value", [NAN, INF])
def test_logits_of_a_prompt_that_are_not_finite_fail_the_request_that_asked_for_them(
    folder: Path, value: float
) -> None:
    poisoned = engine(folder, torch.float32)
    sampling = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2)
    assert poisoned.add(SequenceRequest("bad", tuple(random_ids(9, seed=1)), sampling), 0.0) is None
    assert poisoned.add(SequenceRequest("good", tuple(random_ids(8, seed=1)), sampling), 0.0) is None
    spoilt = spoil(poisoned, 2 + 8 + 7, 2 + 4, value, "head")
    ended = {}
    while poisoned.has_work:
        ended |= {delta.sequence_id: delta for delta in poisoned.step(time.monotonic) if delta.finish_reason}
    assert spoilt
    assert ended["bad"].error == "the model's logits contain NaN or +Inf at position 4 of the prompt"
    assert ended["good"].finish_reason is FinishReason.LENGTH


def test_what_it_wrote_is_not_found_by_another(folder: Path) -> None:
    poisoned = engine(folder)
    for _ in range(2):
        assert run(poisoned, {"bad": [POISON] * 9})["bad"] == ([], FinishReason.ERROR)
    assert run(poisoned, NEIGHBOURS) == run(engine(folder), NEIGHBOURS)


def test_one_that_is_cancelled_before_it_fails_leaves_nothing_either(folder: Path) -> None:
    poisoned = engine(folder)
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    assert poisoned.add(SequenceRequest("bad", tuple([POISON] * 40), sampling), 0.0) is None
    plan = poisoned.plan(0.0)  # a first chunk of 32 tokens
    poisoned.cancel("bad")
    deltas = poisoned.run(plan, (plan.num_tokens,), time.monotonic)
    assert [delta.finish_reason for delta in deltas] == [FinishReason.CANCELLED]
    assert run(poisoned, NEIGHBOURS) == run(engine(folder), NEIGHBOURS)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gate_whose_scores_are_not_numbers_fails_one_request_and_names_the_layer(folder: Path, layer: int) -> None:
    """Before anything is sampled: the poison is in the first of two chunks."""
    poisoned = engine(folder)
    expected = run(engine(folder), NEIGHBOURS)
    gate = poisoned.runner.model.layers[layer].mlp.gate  # type: ignore[attr-defined]
    healthy, victim = gate.linear, random_ids(40, seed=4)
    broken_at: list[int] = []

    class Broken:
        """Not a number for the fourth token of the victim, by its place in the one step that it has to itself."""

        out_features = healthy.out_features

        def apply(self, x_TM: torch.Tensor) -> torch.Tensor:
            logits_TE = healthy.apply(x_TM)
            if x_TM.shape[0] == 32 and not broken_at:
                broken_at.append(3)
                logits_TE[3, 2] = float("nan")
            return logits_TE

    object.__setattr__(gate, "linear", Broken())
    errors = []
    assert poisoned.add(SequenceRequest("bad", tuple(victim), SamplingParams(max_tokens=4)), 0.0) is None
    while poisoned.has_work:
        errors += [delta.error for delta in poisoned.step(time.monotonic)]
    assert broken_at
    assert errors == [f"layer {layer}: the gate's scores are not numbers"]
    assert run(poisoned, NEIGHBOURS) == expected
