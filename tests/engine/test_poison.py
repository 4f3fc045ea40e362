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

POISON = 7  # the embedding of this token id is NaN
NEIGHBOURS = {"a": [3, 5, 11, 2], "b": [9, 4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    model = make_model("qwen3_moe", seed=21)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    return save_model(model, tmp_path_factory.mktemp("poisoned"))


def engine(folder: Path) -> Engine:
    """With few blocks, so that those of an ended sequence are soon used again."""
    model = load_model(folder)
    block_bytes = model.cache_spec.bytes_per_block(0, 4)
    return build_engine(
        RankSpec(model="", kv_bytes=13 * block_bytes, block_size=4, max_num_sequences=4, max_num_tokens=32),
        model,
        torch.device("cpu"),
    )


def run(engine: Engine, prompts: dict[str, list[int]]) -> dict[str, tuple[list[int], FinishReason | None]]:
    ended: dict[str, tuple[list[int], FinishReason | None]] = {name: ([], None) for name in prompts}
    for name, prompt in prompts.items():
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias={POISON: -100.0})
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
