"""benchmarks.peers: what is asked, how it is timed, what it must cost and how figures are compared. No processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import pytest
from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.peers.__main__ import rounds_by_batch
from benchmarks.peers.costs import Machine, cache_bytes, decode_bytes, decode_roof, prefill_roof
from benchmarks.peers.driving import run_batch, run_load
from benchmarks.peers.engines.port import Emit
from benchmarks.peers.gguf_names import gguf_sources, hyperparameters
from benchmarks.peers.measure import agreement, load_rates
from benchmarks.peers.plot import save_plot
from benchmarks.peers.report import show
from benchmarks.peers.roster import ROSTER
from benchmarks.peers.summary import batch_cells, load_cells
from benchmarks.peers.workload import MAX_LENGTH, batch_work, load_work, rotated
from rich.console import Console
from safetensors import safe_open
from typer import BadParameter

from moestro.workers.architectures import parse_config
from moestro.workers.model_config import ModelConfig

MACHINE = Machine(bytes_per_s=1e9, flop_per_s=1e12)


def config(name: str) -> ModelConfig:
    raw = SHAPES[name] | {"architectures": ["Qwen3MoeForCausalLM"], "intermediate_size": 512}
    return parse_config(raw | {"max_position_embeddings": 4096, "norm_topk_prob": True, "tie_word_embeddings": False})


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


class OneSecondSteps:
    """A token a step for each running sequence; a prompt takes a step of its own, and only one is taken a step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[tuple[int, int]] = []
        self._running: dict[int, int] = {}

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        self._waiting.append((number, num_output))

    def step(self, emit: Emit) -> None:
        self._clock.pass_s(1.0)
        if self._waiting:
            number, num_output = self._waiting.pop(0)
            self._running[number] = num_output
        emit({number: [7] for number in self._running})
        self._running = {number: left - 1 for number, left in self._running.items() if left > 1}


def test_decode_counts_what_comes_after_the_last_first_token() -> None:
    clock = Clock()
    result = run_batch(OneSecondSteps(clock), [[1], [2], [3]], 5, clock)
    assert result["prefill_s"] == 3.0
    assert result["decode_s"] == 4.0  # the first sequence ends at 5 s, the last at 7 s
    assert result["num_decoded"] == 2 + 3 + 4
    assert result["tokens"] == [[7] * 5] * 3


def test_time_to_first_token_counts_from_when_a_request_was_due() -> None:
    clock = Clock()
    arrivals = (0.5, 0.75, 9.0)
    requests = [{"arrival_s": at, "prompt": [1], "num_output": 2} for at in arrivals]
    result = run_load(OneSecondSteps(clock), requests, clock, clock.pass_s)
    # The first begins at once; the second is due during that step and begins after it; the third finds an idle engine.
    assert result["ttft_s"] == [1.0, 1.75, 1.0]
    assert result["end_to_end_s"] == [2.0, 2.75, 2.0]
    assert result["total_s"] == 11.0


def test_work_differs_by_round_and_repeats_by_seed() -> None:
    assert batch_work(3, 0, 4) == batch_work(3, 0, 4)
    works = [batch_work(3, number, 4) for number in range(20)]
    assert len({tuple(work.prompts[0]) for work in works}) == 20
    assert len({work.num_output for work in works}) > 5
    assert all(len({len(prompt) for prompt in work.prompts}) == 1 for work in works)
    loads = load_work(3, 0, 2.0, 50)
    assert loads == load_work(3, 0, 2.0, 50)
    assert loads[:10] == load_work(3, 0, 2.0, 10)
    assert loads != load_work(3, 1, 2.0, 50)
    assert max(len(each["prompt"]) + each["num_output"] for each in loads) <= MAX_LENGTH
    assert [rotated("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


@pytest.mark.parametrize(("batch", "distinct"), [(1, 4.0), (4, 10.9375), (16, 15.8396)])
def test_bytes_of_a_step_by_hand(batch: int, distinct: float) -> None:
    """tiny: 8 layers of width 512, 16 experts of 3 x 512 x 512, 8 query and 2 key heads of 64, vocabulary 8,192."""
    parts = decode_bytes(config("tiny"), batch, context=100)
    assert parts.experts == pytest.approx(8 * distinct * 3 * 512 * 512 * 2, rel=1e-5)
    attention = 512 * 64 * (8 + 8 + 2 + 2)
    own = batch * 512 + batch * 8 * 2 * 2 * 64  # embedding rows read, new keys and values written
    assert parts.dense == 2 * (8 * (attention + 512 * 16) + 512 * 8192 + own)
    assert parts.cache == 2 * batch * 100 * 8 * 2 * 2 * 64
    assert parts.cache == cache_bytes(config("tiny"), batch * 100)
    assert decode_roof(config("tiny"), batch, 100, MACHINE) == pytest.approx(batch * 1e9 / parts.total)


def test_prefill_is_bound_by_products() -> None:
    per_token = 2 * 8 * (512 * 64 * 20 + 512 * 16 + 4 * 3 * 512 * 512)
    flop = 16 * 128 * per_token + 2 * 16 * 512 * 8192
    machine = Machine(bytes_per_s=1e10, flop_per_s=1e12)
    assert prefill_roof(config("tiny"), 16, 128, machine) == pytest.approx(16 * 128 * 1e12 / flop)


def row(engine: str, number: int, decode: float, batch: int = 1) -> dict[str, float | str]:
    return {
        "engine": engine,
        "batch": batch,
        "round": number,
        "prompt_tokens": 128,
        "output_tokens": 48,
        "prefill_tokens_per_s": 10 * decode,
        "decode_tokens_per_s": decode,
        "requests_per_s": decode / 100,
        "others_cores": 0.0,
    }


def test_ratios_are_of_the_same_round_and_the_best_peer() -> None:
    speeds: Mapping[str, Sequence[float]] = {"ours": (90, 30, 60), "transformers": (30, 10, 20), "vllm": (60, 30, 80)}
    rows = [row(name, number, each) for name, own in speeds.items() for number, each in enumerate(own)]
    decode, prefill = batch_cells(rows, config("tiny"), MACHINE)
    assert (decode["figure"], prefill["figure"]) == ("decode", "prefill")
    assert decode["best_peer"] == "vllm"
    assert decode["over_best"] == {"median": 1.0, "min": 0.75, "max": 1.5, "goal": 1.0, "met": True}
    assert decode["over_reference"] == {"median": 3.0, "min": 3.0, "max": 3.0, "goal": 3.0, "met": True}
    assert "goal" not in prefill["over_reference"]
    assert decode["engines"]["ours"]["roof_share"] == pytest.approx(60 / decode["roof_tokens_per_s"])
    alone = batch_cells([each for each in rows if each["engine"] == "ours"], config("tiny"), MACHINE)
    assert "over_best" not in alone[0], "without a peer nothing is claimed"


def test_a_load_is_half_of_what_the_slowest_that_is_asked_can_do() -> None:
    rows = [row("ours", 0, 300, 1), row("ours", 0, 900, 16), row("vllm", 0, 800, 16)]
    rows += [row("transformers", 0, 100, 1), row("transformers", 0, 700, 16)]
    assert load_rates(rows, ROSTER) == {0.5: ["ours", "transformers", "vllm"], 4.0: ["ours", "vllm"]}
    fast = [*rows, row("transformers", 0, 2000, 1)]
    assert load_rates(fast, ROSTER) == {4.0: ["ours", "transformers", "vllm"]}, "who can bear the one rate is asked"


def test_latencies_of_all_rounds_are_one_sample() -> None:
    def latencies(engine: str, number: int, *ttft_s: float) -> dict[str, object]:
        own = {"ttft_s": list(ttft_s), "end_to_end_s": list(ttft_s), "others_cores": 0.0}
        return {"engine": engine, "rate": 2.0, "round": number, **own}

    (cell,) = load_cells([latencies("ours", 0, 0.1, 0.2), latencies("ours", 1, 0.3), latencies("vllm", 0, 0.4)])
    assert cell["engines"]["ours"]["requests"] == 3
    assert cell["engines"]["ours"]["ttft_p50_s"] == pytest.approx(0.2)
    assert cell["over_best_ttft_p50_s"] == {"best_peer": "vllm", "ratio": pytest.approx(2.0), "goal": 1.0, "met": True}


def test_agreement_is_up_to_the_first_difference() -> None:
    tokens, reference = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [0, 6, 7, 8]]
    assert agreement(tokens, reference) == {"first_tokens_equal": 0.5, "prefix_equal": 0.25}


def test_an_engine_that_failed_is_in_the_table_with_its_reason(tmp_path: Path) -> None:
    text = StringIO()
    rows = [row("ours", 0, 10.0)]
    model = {
        "engines": {"ours": "as it is", "vllm": "compiled"},
        "machine": {"bytes_per_s": 1e9, "flop_per_s": 1e12},
        "cells": batch_cells(rows, config("tiny"), MACHINE),
        "loads": [],
        "memory": {"ours": {"resident": 2e6, "peak": 3e6}},
        "agreement": {},
        "failures": {"vllm": "no environment: no wheel"},
    }
    show({"models": {"tiny": model}}, Console(file=text, width=200))
    assert "failed" in text.getvalue()
    assert "FAILED: no environment: no wheel" in text.getvalue()
    save_plot({"models": {"tiny": model}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_are_one_number_or_one_for_each_batch_size() -> None:
    assert rounds_by_batch("1,4,16", "5") == {1: 5, 4: 5, 16: 5}
    assert rounds_by_batch("1,16", "5,2") == {1: 5, 16: 2}
    for batches, rounds in (("1,4", "1,2,3"), ("4,1", "2"), ("1,1", "2"), ("1", "0")):
        with pytest.raises(BadParameter):
            rounds_by_batch(batches, rounds)


def test_every_tensor_has_its_name_in_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_experts": 12,
        "vocab_size": 64,
        "moe_intermediate_size": 16,
    }
    monkeypatch.setitem(SHAPES, "small", SHAPES["tiny"] | small)
    folder = checkpoint("small", tmp_path)
    names = [name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    sources = gguf_sources(names)
    assert sorted(name for each in sources.values() for name in each) == sorted(names), "none lost, none twice"
    assert sources["output.weight"] == ["lm_head.weight"]
    assert sources["blk.1.ffn_norm.weight"] == ["model.layers.1.post_attention_layernorm.weight"]
    experts = [f"model.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(11)]
    assert gguf_sources(reversed(experts)) == {"blk.0.ffn_down_exps.weight": experts}, "by number, not by name"
    with pytest.raises(ValueError, match="q_proj"):
        gguf_sources(["model.layers.0.self_attn.q_proj.bias"])


def test_hyperparameters_come_from_old_and_new_configs() -> None:
    raw = SHAPES["mid"] | {"max_position_embeddings": 4096, "intermediate_size": 512, "rms_norm_eps": 1e-6}
    new = hyperparameters(raw | {"rope_parameters": {"rope_theta": 10000.0}})
    old = hyperparameters(raw | {"rope_theta": 10000})
    assert new == old
    assert new["expert_count"] == 32
    assert new["attention.key_length"] == 64
    assert isinstance(new["rope.freq_base"], float)
