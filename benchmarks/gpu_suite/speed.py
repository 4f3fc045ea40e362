"""Decode and prefill of a random Qwen3-30B-A3B made on the device, through the engine, against the measured roofs.

Contexts are real: every prompt is distinct, random and prefilled by the engine in chunks (so the first sequences of a
batch are some tokens ahead of the last). Rounds of decode steps follow with the batch unchanged. Greedy; requests never
end. The share of the roof is the shortest possible time (see ``costs.py``) over the measured one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from benchmarks.gpu_suite import roofs
from benchmarks.gpu_suite.bench import Bench, Plan
from benchmarks.gpu_suite.checks import Check, Settings, Values, attempt, on_cuda_only
from benchmarks.gpu_suite.engines import make_engine
from benchmarks.gpu_suite.mixed import mixed_load
from benchmarks.gpu_suite.roofs import Roofs
from benchmarks.gpu_suite.shapes import QWEN3_30B_A3B, SHAPES
from benchmarks.gpu_suite.timing import synchronize

from moestro.workers.device import configure_torch
from moestro.workers.loading import random_model
from moestro.workers.model.moe import MoeMlp

__all__ = ["FULL", "QWEN3_30B_A3B", "SMALL", "measure", "run", "run_gpt_oss", "run_mixtral"]

FULL = Plan(
    shape=SHAPES["Qwen3-30B-A3B"],
    batches=(1, 8, 64, 256),
    prompt_tokens=896,
    max_context=1024,
    max_num_tokens=8192,
    warm_up_steps=8,
    rounds=5,
    steps_per_round=12,
    split_steps=8,
    prefills=((1, 1008), (8, 1008)),
    case_limit_s=40.0,
    graphs=256,
    skewed=(64,),
    mixed=(128, 1024, 20.0),
)
SMALL = Plan(
    shape=SHAPES["tiny"],
    batches=(1, 3),
    prompt_tokens=20,
    max_context=64,
    max_num_tokens=48,
    warm_up_steps=2,
    rounds=3,
    steps_per_round=4,
    split_steps=2,
    prefills=((1, 32),),
    case_limit_s=20.0,
    graphs=4,
    skewed=(3,),
    mixed=(3, 24, 2.0),
)


MIXTRAL = replace(FULL, shape=SHAPES["Mixtral-8x7B"], rounds=3, prefills=((8, 1008),), skewed=(), mixed=None)
GPT_OSS = replace(FULL, shape=SHAPES["gpt-oss-20b"], rounds=3, prefills=((8, 1008),), skewed=(), mixed=None)
SMALL_WINDOWS = replace(SMALL, shape=SHAPES["tiny, windows"], batches=(3,), skewed=(), mixed=None)


def run(settings: Settings) -> Iterator[Check]:
    """Qwen3-30B-A3B."""
    yield from measure(SMALL if settings.small else FULL, settings)


def run_mixtral(settings: Settings) -> Iterator[Check]:
    """Mixtral-8x7B: 93 GB of weights."""
    yield from measure(SMALL if settings.small else MIXTRAL, settings)


def run_gpt_oss(settings: Settings) -> Iterator[Check]:
    """A stack of gpt-oss-20b's dimensions."""
    yield from measure(SMALL_WINDOWS if settings.small else GPT_OSS, settings)


def measure(plan: Plan, settings: Settings) -> Iterator[Check]:
    """Everything of one plan."""
    configure_torch(settings.device)
    device = torch.device(settings.device)
    held: list[tuple[Roofs, Bench]] = []

    def make() -> Values:
        measured = roofs.measure(settings)  # first: its buffers are gone before the weights come
        if device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        decoder = random_model(plan.shape.config, dtype=torch.bfloat16, device=device, seed=settings.seed)
        synchronize(device)
        made_s = time.perf_counter() - start
        weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        engine = make_engine(
            decoder,
            max_num_sequences=max(plan.batches),
            max_num_tokens=plan.max_num_tokens,
            max_context=max(plan.max_context, 2 * plan.mixed[1] if plan.mixed else 0),
            graphs=plan.graphs,
        )
        held.append((measured, Bench(plan, decoder, engine, settings.seed)))
        experts = {type(layer.mlp.bank.experts).__name__ for layer in decoder.layers if isinstance(layer.mlp, MoeMlp)}
        return {
            "headline": f"made in {made_s:.1f} s",
            "made_s": made_s,
            "weight_bytes": weights,
            "kv_bytes": engine.runner.cache.num_bytes,
            "backend": decoder.stack.backend.name,
            "captured_up_to": plan.graphs,
            "experts": sorted(experts),
            "copy_bytes_per_s": measured.bytes_per_s,
            "matmul_flop_per_s": measured.flop_per_s,
            "shape": plan.shape.raw,
            "differs": plan.shape.differs,
        }

    made = attempt("random model", make)
    yield made
    if made.status != "passed":
        return
    measured, bench = held[0]
    for num_prompts, num_tokens in plan.prefills:
        yield attempt(
            f"prefill {num_prompts} x {num_tokens}",
            lambda num_prompts=num_prompts, num_tokens=num_tokens: bench.prefill(num_prompts, num_tokens, measured),
        )
        bench.clear()
    for batch in plan.batches:
        yield attempt(f"decode batch {batch}", lambda batch=batch: bench.decode(batch, measured))
        # The sequences are still running: the profiler takes their next steps.
        yield on_cuda_only(f"decode batch {batch}: kernels", settings, lambda batch=batch: bench.kernels(batch))
        bench.clear()
    for batch in plan.skewed:
        skewed = attempt("skewed routing", lambda: bench.skew())
        yield skewed
        if skewed.status == "passed":
            yield attempt(f"decode batch {batch}, skewed", lambda batch=batch: bench.decode(batch, measured))
        bench.clear()
    if plan.mixed is not None:
        sequences, tokens, limit_s = plan.mixed
        yield attempt(
            f"mixed load, {tokens} in and {tokens} out, {sequences} at a time",
            lambda: mixed_load(bench, sequences, tokens, limit_s, settings.seed),
        )
