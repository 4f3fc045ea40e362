"""A request's tokens and log probabilities are the same bits alone and in any company, however its prompt is cut, on
one thread and on two, in bf16 and in fp32."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model
from demo.paths import MODEL_DIR
from torch import Tensor

from moestro.kernels.linear import PackedLinear
from moestro.protos.sequences import SamplingParams, SequenceRequest, TokenLogprobs
from moestro.workers.engine import Engine
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder
from moestro.workers.rank_setup import RankSpec, build_engine

MODELS: dict[str, dict[str, object]] = {
    "qwen3_moe": {},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "mixtral": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "olmoe": {"num_key_value_heads": 4},
}
OUTPUT_TOKENS = 8
BLOCK_SIZE = 4


@dataclass
class Answer:
    """What a client sees of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_preemptions: int = field(default=0, compare=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {"demo": MODEL_DIR}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_model(make_model(name, seed=31, **MODELS[name]), tmp_path_factory.mktemp(name))
        return made[name]

    return get


def requests(prompts: Sequence[Sequence[int]]) -> list[SequenceRequest]:
    """Greedy, seeded and penalised sequences, some of which ask for log probabilities."""
    kinds = [
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.9, top_p=0.9, seed=5, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=0, prompt_logprobs=2),
        SamplingParams(temperature=1.2, top_k=20, min_p=0.01, presence_penalty=0.4, seed=9, logprobs=1),
        SamplingParams(temperature=1.0, seed=11, logprobs=4),
    ]
    return [
        SequenceRequest(
            f"r{i}", tuple(prompt), replace(kinds[i % len(kinds)], max_tokens=OUTPUT_TOKENS, ignore_eos=True)
        )
        for i, prompt in enumerate(prompts)
    ]


def engine(model: Decoder, max_num_tokens: int, num_blocks: int = 400) -> Engine:
    per_block = sum(model.cache_spec.bytes_per_block(g, BLOCK_SIZE) for g in range(model.cache_spec.num_groups))
    spec = RankSpec(
        model="",
        kv_bytes=num_blocks * per_block,
        block_size=BLOCK_SIZE,
        max_num_sequences=16,
        max_num_tokens=max_num_tokens,
        max_context=160,
    )
    return build_engine(spec, model, torch.device("cpu"))


def run(engine: Engine, wanted: Sequence[SequenceRequest], seed: int | None = None) -> dict[str, Answer]:
    """With a seed the sequences come in a random order at random steps, else all at once."""
    chance = random.Random(seed)
    waiting = list(wanted)
    if seed is not None:
        chance.shuffle(waiting)
    answers = {request.sequence_id: Answer() for request in wanted}
    while waiting or engine.has_work:
        arriving = len(waiting) if seed is None else min(len(waiting), chance.choice((0, 0, 1, 1, 3)))
        for request in waiting[:arriving]:
            assert engine.add(request, time.monotonic()) is None
        del waiting[:arriving]
        for delta in engine.step(time.monotonic):
            answer = answers[delta.sequence_id]
            answer.tokens.extend(delta.token_ids)
            answer.logprobs.extend(delta.logprobs or ())
            answer.prompt_logprobs.extend(delta.prompt_logprobs or ())
            if delta.ledger is not None:
                answer.num_preemptions = delta.ledger.num_preemptions
    return answers


def alone(model: Decoder, wanted: Sequence[SequenceRequest]) -> dict[str, Answer]:
    solo = engine(model, max_num_tokens=256)
    return {request.sequence_id: run(solo, [request])[request.sequence_id] for request in wanted}


def differences(
    model: Decoder,
    wanted: Sequence[SequenceRequest],
    expected: dict[str, Answer],
    *,
    seed: int,
    perturbations: Sequence[tuple[int, int]] = ((16, 400), (17, 50), (256, 400)),
) -> list[str]:
    """Which sequences came out differently among the others, under which (tokens of a step, blocks of the pool)."""
    found = []
    for number, (chunk, num_blocks) in enumerate(perturbations):
        got = run(engine(model, chunk, num_blocks), wanted, seed=seed + number)
        found += [
            f"{k}: chunk {chunk}, {num_blocks} blocks, seed {seed + number}" for k in got if got[k] != expected[k]
        ]
    return found


def prompts_of(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (37, 1, 18, 130, 5, 64, 9)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [*MODELS, "demo"])
def test_the_answer_does_not_depend_on_the_batch(folder: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    model = load_model(folder(name), dtype=dtype)
    wanted = requests(prompts_of(model.config.vocab_size))
    expected = alone(model, wanted)
    assert all(len(answer.tokens) == len(answer.logprobs) == OUTPUT_TOKENS for answer in expected.values())
    assert len(expected["r2"].prompt_logprobs) == 18
    assert not differences(model, wanted, expected, seed=100)
    small = [request for request in wanted if len(request.prompt_ids) < 40]
    num_preemptions = 0
    for num_blocks in (14, 20, 22, 26):  # room for prompts, not always for all that follows them
        crowded = run(engine(model, 64, num_blocks), small)
        num_preemptions += sum(answer.num_preemptions for answer in crowded.values())
        assert crowded == {key: expected[key] for key in crowded}, num_blocks
    assert num_preemptions > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["qwen3_moe", "demo"])
def test_nor_on_the_number_of_threads(folder: Callable[[str], Path], name: str, dtype: torch.dtype) -> None:
    model = load_model(folder(name), dtype=dtype)
    wanted = requests(prompts_of(model.config.vocab_size))[:4]
    expected = alone(model, wanted)
    torch.set_num_threads(2)
    threaded = load_model(folder(name), dtype=dtype)
    assert not differences(threaded, wanted, expected, seed=200, perturbations=((64, 400),))


@pytest.mark.parametrize("chunk", [1, 7])
def test_prompts_in_small_pieces(folder: Callable[[str], Path], chunk: int) -> None:
    model = load_model(folder("qwen3_moe"), dtype=torch.float32)
    wanted = requests(prompts_of(model.config.vocab_size)[:4])
    one_by_one = replace(RankSpec(model=""), block_size=BLOCK_SIZE, max_num_sequences=1, max_num_tokens=chunk)
    solo = build_engine(replace(one_by_one, max_context=160), model, torch.device("cpu"))
    assert {r.sequence_id: run(solo, [r])[r.sequence_id] for r in wanted} == alone(model, wanted)


@dataclass(frozen=True, slots=True)
class RowsDecide:
    """A violation: a product whose terms are added up in another order when there are more than two rows."""

    of: PackedLinear
    weight_OI: Tensor

    @property
    def out_features(self) -> int:
        return self.of.out_features

    def apply(self, x_TI: Tensor) -> Tensor:
        if x_TI.shape[0] <= 2:
            return self.of.apply(x_TI)
        half = x_TI.shape[1] // 2
        return x_TI[:, :half] @ self.weight_OI[:, :half].T + x_TI[:, half:] @ self.weight_OI[:, half:].T


def test_a_product_that_depends_on_the_rows_is_found(tmp_path: Path) -> None:
    theirs = make_model("qwen3_moe", seed=31)
    model = load_model(save_model(theirs, tmp_path), dtype=torch.float32)
    wanted = requests([random_ids(n, seed=n) for n in (9, 14, 5)])
    linear = RowsDecide(model.layers[1].attention.out, theirs.model.layers[1].self_attn.o_proj.weight.detach())
    broken = replace(model.layers[1], attention=replace(model.layers[1].attention, out=linear))
    planted = model.with_layers((model.layers[0], broken))
    assert not differences(model, wanted, alone(model, wanted), seed=7, perturbations=((16, 400),))
    assert differences(planted, wanted, alone(planted, wanted), seed=7, perturbations=((16, 400),))
