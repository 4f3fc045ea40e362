"""The baseline of ``benchmarks.invariance`` is the same model with other kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.engines import run_batch
from benchmarks.noninvariant import AnyRows, noninvariant
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.kernels.plain import PlainBackend
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine


def test_the_baseline_generates_what_the_engine_generates(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = load_model(
        save_model(make_model("qwen3_moe", seed=31), tmp_path), dtype=torch.bfloat16, backend=PlainBackend()
    )
    fastest = noninvariant(model)
    for layer in fastest.layers:
        expert = layer.mlp.bank.experts.expert_L[0]
        assert all(isinstance(each, AnyRows) for each in (layer.mlp.gate.linear, expert.gate_up, expert.down))
    spec = RankSpec(model="", kv_bytes=2**22, block_size=4, max_num_tokens=256, max_context=64)
    prompts = [random_ids(length, seed=length) for length in (37, 5, 18, 9)]
    ours, theirs = (
        run_batch(build_engine(spec, each, torch.device("cpu")), prompts, 8)[1] for each in (model, fastest)
    )
    # Of 32 tokens a few may differ where two candidates are closer than rounding.
    agreeing = sum(a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))
    assert agreeing >= 24, (ours, theirs)
