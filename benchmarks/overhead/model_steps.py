"""How long a real decode step takes, to say what share of it the host's part is."""

from __future__ import annotations

import statistics
import time

import torch
from benchmarks.checkpoints import SHAPES

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.architectures import parse_config
from moestro.workers.engine import Engine
from moestro.workers.loading import random_model
from moestro.workers.rank_setup import RankSpec, build_engine

ENOUGH_US = 1e6  # of measured steps for each batch


def step_us(name: str, batches: tuple[int, ...]) -> dict[int, float]:
    """Median microseconds (wall clock) of a step of the benchmark model ``name``, random weights in bf16, by the number
    of sequences that decode. Their context is short, which makes the step short and the host's share large."""
    shape = SHAPES[name]
    config = parse_config(
        {
            **shape,
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": shape["moe_intermediate_size"],
            "max_position_embeddings": 256,
            "torch_dtype": "bfloat16",
        }
    )
    most = max(batches)
    spec = RankSpec(model="", max_num_sequences=most, max_num_tokens=most, kv_bytes=2**30)
    engine = build_engine(spec, random_model(config, dtype=torch.bfloat16), torch.device("cpu"))
    sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    medians = {}
    for batch in batches:
        for number in range(batch):
            engine.add(SequenceRequest(f"{batch} {number}", (number % shape["vocab_size"],), sampling), 0.0)
        engine.step(time.monotonic)
        times = [_timed(engine)]
        while sum(times) < ENOUGH_US and len(times) < 100:
            times.append(_timed(engine))
        medians[batch] = statistics.median(times)
        for number in range(batch):
            engine.cancel(f"{batch} {number}")
        engine.skip(engine.plan(0.0), 0.0)
    return medians


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step(time.monotonic)
    return (time.perf_counter() - start) * 1e6
