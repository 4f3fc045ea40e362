"""Captured steps with a stand-in for the graph: the same tokens, logits and counts as computed eagerly.

The stand-in calls the captured work again on the same tensors, which is what a replay does; that CUDA can capture it is
walked in ``tests/gpu/test_fake_cuda.py`` (nothing waits) and checked on a device by ``benchmarks.gpu_suite``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from benchmarks.small_models import MODELS, make_model
from torch import Tensor

from moestro.kernels.plain import PlainBackend
from moestro.protos.sequences import EngineLimits, SamplingParams, SequenceRequest
from moestro.router.assign import lay_out
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.parallel import GroupShape, NoTensorParallel
from moestro.router.placement import EMPTY, Placement
from moestro.router.transport import LocalTransport
from moestro.workers.architectures import parse_config
from moestro.workers.batch import Batch
from moestro.workers.captured.graph import Called
from moestro.workers.captured.runner import CapturedRunner, capture_runner
from moestro.workers.captured.setup import static_bytes, step_runner, usable_sizes, why_not_captured
from moestro.workers.captured.sizes import GraphSizes, graph_sizes
from moestro.workers.captured.tail import GREEDY, Tail
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.loading import RandomSource
from moestro.workers.model.decoder import Decoder, build_decoder
from moestro.workers.runner import Runner
from moestro.workers.sampling.greedy_codes import greedy_codes
from moestro.workers.sampling.noise import gumbel_, uniform_vocab
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

CPU = torch.device("cpu")
BLOCK, CONTEXT, SEQUENCES = 8, 96, 6
SIZES = GraphSizes((1, 2, 4, 8))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def config_of(name: str):
    raw = make_model(name).config.to_dict()
    raw["architectures"] = [f"{MODELS[name][0]}ForCausalLM"]
    return parse_config({key: value for key, value in raw.items() if value is not None})


def make_decoder(name: str, placements: tuple[Placement, ...] | None = None) -> Decoder:
    config = config_of(name)
    placed = placements or (Placement(config.num_experts, (tuple(range(config.num_experts)),)),) * config.num_moe_layers
    parallel = ExpertParallel(LocalTransport(placed[0].capacity if placed else 0), placed)
    return build_decoder(
        config, RandomSource(torch.bfloat16, CPU, PlainBackend(), 5, 0.1), NoTensorParallel(), parallel
    )


@dataclass
class Kept:
    """A model that keeps the logits of every step."""

    model: Decoder
    logits: list[Tensor] = field(default_factory=list)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        logits_RV = self.model.forward(batch, cache)
        self.logits.append(logits_RV.clone())
        return logits_RV


def drawn(logits_RV: Tensor, temperature_R: Tensor, key_R: Tensor) -> Tensor:
    """What a tail that draws must do, by the sampler's own noise."""
    greedy_R = greedy_codes(logits_RV)
    tempered_RV = (logits_RV - logits_RV.amax(1, keepdim=True)) / temperature_R[:, None]
    noise_RV = gumbel_(uniform_vocab(key_R, logits_RV.shape[1]))
    drawn_R = noise_RV.add_(tempered_RV).argmax(1)
    return torch.where((temperature_R > 0) & (greedy_R >= 0), drawn_R, greedy_R)


def make_engine(decoder: Decoder, captured: bool, tail: Tail = GREEDY) -> Engine:
    num_blocks = SEQUENCES * CONTEXT // BLOCK + 1
    config = SchedulerConfig(
        groups=tuple(CacheGroup(window, num_blocks) for window in decoder.cache_spec.windows),
        block_size=BLOCK,
        max_num_sequences=SEQUENCES,
        max_num_tokens=24,
        max_context=CONTEXT,
    )
    cache = decoder.cache_spec.allocate(num_blocks + captured, BLOCK)
    runner = Runner(Kept(decoder), cache, CPU)
    chosen = capture_runner(runner, decoder, SIZES, CONTEXT // BLOCK, 1, Called, tail) if captured else runner
    return Engine(Scheduler(config), chosen, EngineLimits(decoder.config.vocab_size, CONTEXT, 100))


def requests(vocab_size: int, seed: int) -> list[tuple[int, SequenceRequest]]:
    """(step of arrival, request): short and long prompts, greedy and drawn, some with log probabilities."""
    rng = random.Random(seed)
    made = []
    for index in range(9):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.choice((1, 3, 17, 40))))
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 0.0, 0.8)),
            top_k=rng.choice((0, 5)),
            seed=index,
            max_tokens=rng.choice((1, 9, 30)),
            ignore_eos=True,
            logprobs=rng.choice((None, None, 2)),
            prompt_logprobs=rng.choice((None, None, None, 1)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
        )
        made.append((rng.randrange(20), SequenceRequest(str(index), prompt, sampling)))
    return made


@dataclass
class Served:
    tokens: dict[str, list[object]]
    rows: list[list[int]]
    replays: int


def serve(decoder: Decoder, captured: bool, seed: int, tail: Tail = GREEDY) -> Served:
    for bank in decoder.banks.values():
        bank.rows_L.zero_()
    engine = make_engine(decoder, captured, tail)
    waiting, step, now = requests(decoder.config.vocab_size, seed), 0, 0.0
    told: dict[str, list[object]] = {}
    replays = 0
    while waiting or engine.has_work:
        for _, request in [one for one in waiting if one[0] <= step]:
            assert engine.add(request, now) is None
        waiting = [one for one in waiting if one[0] > step]
        plan = engine.plan(now)
        launched = engine.launch(plan, (plan.num_tokens,))
        replays += type(launched).__name__ == "_Replayed"
        for delta in engine.collect(plan, launched, lambda: 0.0):
            assert not delta.error
            told.setdefault(delta.sequence_id, []).append((tuple(delta.token_ids), tuple(delta.logprobs)))
        step += 1
    return Served(told, [bank.rows_L.tolist() for bank in decoder.banks.values()], replays)


@pytest.mark.parametrize("tail", [GREEDY, Tail(True, drawn)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "mistral", "qwen2_moe"])
def test_tokens_log_probabilities_and_counts_are_those_of_the_eager_runner(name, tail):
    decoder = make_decoder(name)
    seed = 11
    eager, captured = serve(decoder, False, seed), serve(decoder, True, seed, tail)
    assert captured.replays > 10, "the graphs were hardly used"
    assert captured.tokens == eager.tokens, f"seed {seed}"
    assert captured.rows == eager.rows, f"seed {seed}"


def running(decoder: Decoder, count: int, *, length: int = 5) -> tuple[Engine, Engine]:
    """An eager and a capturing engine whose ``count`` sequences decode."""
    made = []
    for captured in (False, True):
        engine = make_engine(decoder, captured)
        for index in range(count):
            prompt = tuple((7 * index + offset) % 90 + 1 for offset in range(length))
            sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            assert engine.add(SequenceRequest(str(index), prompt, sampling), 0.0) is None
        made.append(engine)
    return made[0], made[1]


def step(engine: Engine) -> dict[str, tuple[int, ...]]:
    return {delta.sequence_id: tuple(delta.token_ids) for delta in engine.step(lambda: 0.0)}


@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_the_logits_have_the_same_bits_and_padding_touches_no_block(count):
    decoder = make_decoder("qwen3_moe")
    eager, captured = running(decoder, count)
    runner = captured.runner
    assert isinstance(runner, CapturedRunner)
    for _ in range(12):
        assert step(eager) == step(captured)
        spare = captured.runner.cache.layers[0].shape[0] - 1
        for want, got in zip(eager.runner.cache.layers, captured.runner.cache.layers, strict=True):
            assert torch.equal(want, got[:spare])
        assert not captured.runner.cache.layers[0][0].any()
    want_RV = eager.runner.model.logits[-1]
    assert torch.equal(runner.outputs.logits_RV[:count], want_RV)


def test_a_row_that_is_not_a_number_fails_alone_and_says_where():
    decoder = make_decoder("qwen3_moe")
    decoder.embedding.weight_vM[93] = float("nan")
    told = []
    for captured in (False, True):
        engine = make_engine(decoder, captured)
        for name, last in (("sound", 5), ("bad", 6), ("other", 7)):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias={93: 1e9} if name == "bad" else {}
            )
            assert engine.add(SequenceRequest(name, (1, 2, last), sampling), 0.0) is None
        deltas = []
        while engine.has_work:
            deltas += engine.step(lambda: 0.0)
        told.append([(d.sequence_id, tuple(d.token_ids), d.error) for d in deltas])
    assert told[0] == told[1]
    errors = {name: error for name, _, error in told[1] if error}
    assert set(errors) == {"bad"}
    assert "gate's scores are not numbers" in errors["bad"]


def test_rows_that_are_drawn_are_drawn_in_the_graph():
    """With a temperature and nothing else the graph's codes are taken; the logits would give the same."""
    decoder = make_decoder("qwen3_moe")
    told = []
    for tail in (None, GREEDY, Tail(True, drawn)):
        engine = make_engine(decoder, tail is not None, tail or GREEDY)
        for index in range(5):
            sampling = SamplingParams(temperature=0.7 * (index % 3), seed=2**63 + index, max_tokens=12, ignore_eos=True)
            assert engine.add(SequenceRequest(str(index), (index + 1, 3), sampling), 0.0) is None
        steps = []
        while engine.has_work:
            steps.append(step(engine))
        told.append(steps)
    assert told[0] == told[1] == told[2]
    assert Tail(True, drawn).serves(SamplingParams(temperature=0.7))
    assert not GREEDY.serves(SamplingParams(temperature=0.7))
    assert not Tail(True, drawn).serves(SamplingParams(temperature=0.7, top_k=3))


def test_a_layout_may_change_between_two_replays():
    """Experts change slots: tokens stay, rows are counted where they are computed."""
    num = config_of("qwen3_moe").num_experts
    layers = config_of("qwen3_moe").num_moe_layers
    before = Placement(num, ((*range(num), EMPTY, EMPTY),))
    after = Placement(num, ((EMPTY, *reversed(range(num)), EMPTY),))
    decoder = make_decoder("qwen3_moe", (before,) * layers)
    eager, captured = running(decoder, 5)
    for _ in range(4):
        assert step(eager) == step(captured)
    for bank in decoder.banks.values():
        held = list(bank.experts.expert_L)
        first = {expert: slot for slot, expert in reversed(list(enumerate(before.slots[0])))}
        staged = {slot: held[first[expert]] for slot, expert in enumerate(after.slots[0]) if expert != EMPTY}
        bank.switch_(lay_out(after, 0, CPU), staged)
    counts = []
    for engine in (eager, captured):
        for bank in decoder.banks.values():
            bank.rows_L.zero_()
        counts.append(([step(engine) for _ in range(6)], [bank.rows_L.tolist() for bank in decoder.banks.values()]))
    assert counts[0] == counts[1]


def test_a_model_that_cannot_be_captured_says_why_and_is_served_eagerly(caplog):
    decoder = make_decoder("qwen3_moe")
    assert why_not_captured(decoder) == "graphs are CUDA's, and the rank is on cpu"
    on_cuda = replace(decoder, cache_spec=replace(decoder.cache_spec, device=torch.device("cuda")))
    assert "how many rows each expert has" in why_not_captured(on_cuda)
    with caplog.at_level("INFO"):
        sizes = usable_sizes(decoder, 8, GroupShape())
    assert "graphs: none, since graphs are CUDA's" in caplog.text
    eager = Runner(decoder, decoder.cache_spec.allocate(2, BLOCK), CPU)
    assert step_runner(eager, decoder, sizes, 4, GroupShape()) is eager
    captured = step_runner(eager, decoder, SIZES, 4, GroupShape(), Called)
    assert isinstance(captured, CapturedRunner)
    assert captured.num_bytes == static_bytes(SIZES, decoder.config.vocab_size, 4, 1)


def test_sizes():
    alone = graph_sizes(256, GroupShape())
    assert alone.rows[:8] == (1, 2, 4, 8, 16, 24, 32, 40)
    assert alone.largest == 256
    assert graph_sizes(100, GroupShape()).largest == 96
    assert graph_sizes(0, GroupShape()).rows == ()
    assert graph_sizes(100, GroupShape(4, 2)).rows == (1, 2, 4, 8, 16, 32, 64)
    assert graph_sizes(100, GroupShape(2, 3)).rows == ()
    assert [SIZES.fit(tokens) for tokens in ((0,), (1,), (3, 0), (0, 5), (9,))] == [None, 1, 4, 8, None]
    with pytest.raises(ValueError, match="ascending"):
        GraphSizes((2, 1))
