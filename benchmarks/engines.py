"""An engine of ours without a cluster, for benchmarks that measure the engine alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.engine import Engine


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run. ``prefill_s`` ends when every sequence has its first token."""

    prefill_s: float
    decode_s: float
    num_decoded: int  # tokens after each sequence's first

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_decoded / self.decode_s


def run_batch(engine: Engine, prompts: Sequence[Sequence[int]], num_output: int) -> tuple[Timing, list[list[int]]]:
    """All prompts at once, greedy, ``num_output`` tokens each. The engine is idle before and after."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        refusal = engine.add(SequenceRequest(f"{start} {index}", tuple(prompt), sampling), time.monotonic())
        if refusal is not None:
            raise RuntimeError(refusal)
        outputs[f"{start} {index}"] = []
    first = start
    while engine.has_work:
        for delta in engine.step(time.monotonic):
            outputs[delta.sequence_id].extend(delta.token_ids)
        if first == start and all(outputs.values()):
            first = time.perf_counter()
    end = time.perf_counter()
    return Timing(first - start, end - first, len(prompts) * (num_output - 1)), list(outputs.values())
