"""Digests of hidden states: what they distinguish, who gets them, and that they are those of the hidden states."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.protos.sequences import Diagnostics, PositionTrace, SamplingParams, SequenceRequest
from moestro.workers.engine import Engine
from moestro.workers.hidden_trace import HiddenTrace, digest
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

WEIGHTS_4 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F5, 0x06C45D188009454F, 0xF88BB8A8724C81ED)
"""Published first outputs of SplitMix64 from seed 0, the lowest bit set."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model(make_model("qwen3_moe", seed=5), tmp_path_factory.mktemp("traced"))


def run(folder: Path, requests: list[SequenceRequest], max_num_tokens: int = 64) -> dict[str, list[PositionTrace]]:
    """The traces by sequence, in the order told; asserts that nothing is told after the end."""
    model = load_model(folder)
    spec = RankSpec(model="", block_size=4, max_num_sequences=4, max_num_tokens=max_num_tokens)
    engine: Engine = build_engine(spec, model, torch.device("cpu"))
    traces: dict[str, list[PositionTrace]] = {request.sequence_id: [] for request in requests}
    ended = set()
    for request in requests:
        assert engine.add(request, 0.0) is None
    while engine.has_work:
        for delta in engine.step(time.monotonic):
            assert delta.sequence_id not in ended
            traces[delta.sequence_id] += delta.trace
            if delta.finish_reason is not None:
                ended.add(delta.sequence_id)
    return traces


def request(name: str, num_prompt: int, seed: int = 0, **diagnostics: object) -> SequenceRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    prompt = tuple(random_ids(num_prompt, seed=seed)[:num_prompt])
    return SequenceRequest(name, prompt, sampling, diagnostics=Diagnostics(**diagnostics))  # type: ignore[arg-type]


def test_it_is_the_weighted_sum_of_the_bits() -> None:
    x_KM = torch.tensor([[1.0, -2.0, 0.5, -0.0], [0.0, 0.0, 0.0, 0.0]])
    bits = (0x3F800000, 0xC0000000 - 2**32, 0x3F000000, 0x80000000 - 2**32)  # IEEE 754, read as signed integers
    by_hand = sum(bit * weight for bit, weight in zip(bits, WEIGHTS_4, strict=True)) % 2**64
    assert [value % 2**64 for value in digest(x_KM).tolist()] == [by_hand, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_one_bit_any_exchange_and_nothing_else_changes_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x_M = torch.randn(64, generator=generator).to(dtype)
    seen = {int(digest(x_M[None]))}
    for place in range(64):
        for bit in range(8 * dtype.itemsize):
            changed_M = x_M.clone().view(torch.int16 if dtype is torch.bfloat16 else torch.int32)
            shift = 1 << bit
            changed_M[place] ^= shift - (2 * shift if bit == 8 * dtype.itemsize - 1 else 0)
            seen.add(int(digest(changed_M.view(dtype)[None])))
    for place in range(63):
        order = [*range(64)]
        order[place], order[place + 1] = place + 1, place
        seen.add(int(digest(x_M[order][None])))
    assert len(seen) == 1 + 64 * 8 * dtype.itemsize + 63
    batch_KM = torch.randn(9, 64, generator=generator).to(dtype)
    batch_KM[7] = x_M
    assert digest(batch_KM)[7] == digest(x_M[None])[0]


def test_a_model_that_shows_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not trace"):
        HiddenTrace(torch.arange(2)).digests()


def test_every_computed_position_and_layer_of_those_who_ask(folder: Path) -> None:
    traces = run(folder, [request("asks", 11, trace=True), request("does not", 7, seed=1)])
    assert traces["does not"] == []
    assert [p.position for p in traces["asks"]] == list(range(11 + 6 - 1))  # the last token is never computed
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert {len(p.layers) for p in traces["asks"]} == {num_layers}
    assert all(0 <= value < 2**64 for p in traces["asks"] for value in p.layers)
    assert len({value for p in traces["asks"] for value in p.layers}) == 16 * num_layers


def test_chunks_without_a_token_are_told_too(folder: Path) -> None:
    whole = run(folder, [request("a", 11, trace=True)])["a"]
    chunked = run(folder, [request("a", 11, trace=True, max_chunk=4)])["a"]
    assert [p.position for p in chunked] == [p.position for p in whole]


def test_a_preempted_one_computes_and_tells_every_position_again(folder: Path) -> None:
    traces = run(folder, [request("a", 11, trace=True, preempt_at=3)])["a"]
    assert [p.position for p in traces] == [*range(11 + 2), *range(11 + 5)]


def test_positions_found_in_the_cache_are_not_told(folder: Path) -> None:
    traces = run(folder, [request("first", 11, trace=True), request("finds", 11, trace=True)])
    assert [p.position for p in traces["finds"]] == list(range(8, 16))
    assert [p for p in traces["first"] if p.position in (8, 9, 10)]
