"""A mixed load: prompts arrive as answers end, so that every step has some of both.

A closed loop with a fixed number of sequences. To begin in the steady state, the first ones have answers of evenly
spread lengths; every one that ends is followed by one of full length.
"""

from __future__ import annotations

import random
import time

from benchmarks.gpu_suite.bench import Bench
from benchmarks.gpu_suite.checks import Unmet, Values
from benchmarks.gpu_suite.energy import measured as energy_of
from benchmarks.gpu_suite.timing import synchronize

from moestro.protos.sequences import SamplingParams, SequenceRequest


def mixed_load(bench: Bench, sequences: int, tokens: int, limit_s: float, seed: int) -> Values:
    """Tokens per second over ``limit_s`` after the first sequences have answered."""
    rng, engine = random.Random(seed), bench.engine
    vocab_size, made, running = bench.decoder.config.vocab_size, 0, 0

    def add(num_output: int) -> None:
        nonlocal made, running
        prompt = tuple(rng.choices(range(vocab_size), k=tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        refusal = engine.add(SequenceRequest(f"mixed {made}", prompt, sampling), time.monotonic())
        if refusal is not None:
            raise Unmet(refusal)
        made, running = made + 1, running + 1

    def step() -> tuple[int, int]:
        """Output tokens, and sequences that ended."""
        nonlocal running
        drawn = ended = 0
        for delta in engine.step(time.monotonic):
            if delta.error:
                raise Unmet(f"{delta.sequence_id}: {delta.error}")
            drawn += len(delta.token_ids)
            ended += delta.finish_reason is not None
        running -= ended
        for _ in range(ended):
            add(tokens - 1)
        return drawn, ended

    try:
        for index in range(sequences):
            add(max(1, (index + 1) * (tokens - 1) // sequences))
        begun = time.perf_counter()
        while time.perf_counter() - begun < limit_s:  # every first prompt is computed
            step()
            if engine.load().num_waiting == 0:
                break
        steps = drawn = ended = 0
        synchronize(bench.device)
        start = time.perf_counter()
        with energy_of(bench.device) as energy:
            while (elapsed := time.perf_counter() - start) < limit_s:
                more, done = step()
                steps, drawn, ended = steps + 1, drawn + more, ended + done
            synchronize(bench.device)
    finally:
        for index in range(made):
            engine.cancel(f"mixed {index}")
        while engine.has_work:
            engine.step(time.monotonic)
    if not ended:
        raise Unmet(f"no sequence ended in {elapsed:.1f} s", steps=steps, tokens=drawn)
    return {
        "headline": f"{drawn / elapsed:,.0f} output tok/s, {elapsed / steps * 1e3:.2f} ms a step",
        "output_tokens_per_s": drawn / elapsed,
        "prompt_tokens_per_s": ended * tokens / elapsed,
        "steps": steps,
        "seconds": elapsed,
        "ended": ended,
        "energy": energy.per(drawn),
    }
