"""All layers in one call give the bits of the layers one by one; and which models have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model
from tests.model.oracle import Driver

from moestro.kernels.cpu.build import unavailable_reason
from moestro.workers.loading import load_model
from moestro.workers.model.layer_stack import FusedStack, LoopedStack

needs_kernels = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
WINDOWED = {"sliding_window": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, **options: save_model(make_model(name, **options), tmp_path / name)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "options"), [("qwen3_moe", {}), ("mixtral", WINDOWED)])
def test_the_bits_are_those_of_the_loop(
    folder: Callable[..., Path], name: str, options: dict[str, object], threads: int
) -> None:
    torch.set_num_threads(threads)
    model = load_model(folder(name, **options), dtype=torch.bfloat16)
    assert isinstance(model.stack, FusedStack)
    fused, looped = Driver(model), Driver(model.with_layers(model.layers))
    rows = [bank.rows_L.clone() for bank in model.banks.values()]
    steps = [
        [(0, random_ids(9, seed=1))],
        [(0, random_ids(1, seed=2)), (1, random_ids(150, seed=3))],
        [(0, random_ids(1, seed=4)), (1, random_ids(1, seed=5)), (2, random_ids(2, seed=6))],
    ]
    for step in steps:
        for ours, wanted in zip(fused.step(step), looped.step(step), strict=True):
            assert torch.equal(ours, wanted)
    for ours, wanted in zip(fused.cache.layers, looped.cache.layers, strict=True):
        assert torch.equal(ours, wanted)
    # The two share their banks, so each token was counted twice.
    num_tokens = sum(len(ids) for step in steps for _, ids in step)
    for bank, before in zip(model.banks.values(), rows, strict=True):
        assert int((bank.rows_L - before).sum()) == 2 * num_tokens * model.layers[0].mlp.gate.spec.top_k


@needs_kernels
@pytest.mark.parametrize("name", ["qwen2_moe", "olmoe", "dots1"])
def test_other_layers_are_looped(folder: Callable[..., Path], name: str) -> None:
    """A shared or dense layer, a norm over all heads, a gate in fp32."""
    assert isinstance(load_model(folder(name), dtype=torch.bfloat16).stack, LoopedStack)


def test_the_plain_backend_loops(folder: Callable[..., Path]) -> None:
    assert isinstance(load_model(folder("qwen3_moe"), dtype=torch.float32).stack, LoopedStack)


@needs_kernels
def test_a_slot_that_does_not_exist_is_refused(folder: Callable[..., Path]) -> None:
    model = load_model(folder("qwen3_moe"), dtype=torch.bfloat16)
    model.layers[1].mlp.bank.layout.slot_E[:] = 99
    with pytest.raises(IndexError, match="slot"):
        Driver(model).step([(0, random_ids(3, seed=1))])
