"""What the scheduler costs the host: ``plan`` and ``apply`` of one step, and taking in a prompt.

    python benchmarks/scheduler.py [--rounds 5] [--steps 200]

Steady decoding: every running sequence gets one token a step; the table shows the median over rounds of the median
step, and the range of those medians, in CPU time of the thread: it computes and never waits, and the wall clock would
measure who else uses the machine. Sizes are interleaved, so that a busy moment of the machine hits all of them. One
step in sixteen takes and names a block for a sequence, as in real decoding: the prompts have different lengths.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import thread_time as clock
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table

from moestro.protos.sequences import SampledToken, SamplingParams, SequenceRequest
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 16
PROMPT = 100
SIZES = (1, 16, 64, 256, 1024, 4096)
LAYOUTS = {"full": (None,), "full and window 128": (None, 128)}


def filled(windows: tuple[int | None, ...], size: int, steps: int) -> Scheduler:
    """A scheduler with ``size`` sequences, all of them decoding."""
    longest = PROMPT + BLOCK_SIZE + steps + 8
    blocks = 1 + size * (longest // BLOCK_SIZE + 2)
    groups = tuple(CacheGroup(window, blocks) for window in windows)
    # All prompts in one step: or the first to decode would outgrow their share of the blocks before the last begin.
    config = SchedulerConfig(groups, BLOCK_SIZE, size, size * (PROMPT + BLOCK_SIZE), 4096, size)
    scheduler = Scheduler(config)
    for number in range(size):
        prompt = tuple(range(number, number + PROMPT + number % BLOCK_SIZE))
        scheduler.add(SequenceRequest(str(number), prompt, SamplingParams(max_tokens=3000)), 0.0)
    while True:
        plan = scheduler.plan(0.0)
        scheduler.apply(plan, {span.sequence.sequence_id: SampledToken(7) for span in plan.spans if span.samples}, 0.0)
        if plan.num_decodes == size:
            return scheduler


def decode_round(windows: tuple[int | None, ...], size: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step, and of its two halves."""
    scheduler = filled(windows, size, steps)
    sampled = {str(number): SampledToken(7) for number in range(size)}
    plans, applies = [], []
    for _ in range(steps):
        t0 = clock()
        plan = scheduler.plan(0.0)
        t1 = clock()
        scheduler.apply(plan, sampled, 0.0)
        t2 = clock()
        plans.append((t1 - t0) * 1e3)
        applies.append((t2 - t1) * 1e3)
    both = [p + a for p, a in zip(plans, applies, strict=True)]
    return {"plan": statistics.median(plans), "apply": statistics.median(applies), "step": statistics.median(both)}


def prompt_round(length: int, is_cached: bool) -> dict[str, float]:
    """Milliseconds to add, plan and apply one prompt that is computed in one step, then known or not."""
    config = SchedulerConfig((CacheGroup(None, 4 * length // BLOCK_SIZE),), BLOCK_SIZE, 1, length, length + 1, 1)
    scheduler = Scheduler(config)
    prompt = tuple(range(length))

    def serve(name: str) -> float:
        t0 = clock()
        scheduler.add(SequenceRequest(name, prompt, SamplingParams(max_tokens=1)), 0.0)
        scheduler.apply(scheduler.plan(0.0), {name: SampledToken(7)}, 0.0)
        return (clock() - t0) * 1e3

    first = serve("first")
    return {"step": serve("second") if is_cached else first}


def policy_run(
    slots: int, blocks: int, admission: Literal["continuous", "static"], reservation: Literal["paged", "max_length"]
) -> dict[str, float]:
    """64 sequences with lognormal output lengths. Exact counts, no times: steps until all have ended, and how many run
    on average, over all steps and while others wait. A step that decodes costs about the same for few as for many, so
    fewer steps are more throughput."""
    rng = random.Random(0)
    config = SchedulerConfig(
        (CacheGroup(None, blocks + 1),), BLOCK_SIZE, slots, 512, 1024, 64, admission=admission, reservation=reservation
    )
    scheduler = Scheduler(config)
    for number in range(64):
        # The client does not know the length beforehand and asks for up to 512; an end token comes when it comes.
        sampling = SamplingParams(max_tokens=512, eos_token_ids=(0,))
        scheduler.add(SequenceRequest(str(number), tuple(range(1 + number, 33 + number)), sampling), 0.0)
    lengths = {str(number): min(512, max(1, round(rng.lognormvariate(4.0, 1.0)))) for number in range(64)}
    running, contended = [], []
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        running.append(len(plan.spans))
        if scheduler.load().num_waiting:
            contended.append(len(plan.spans))
        sampled = {}
        for span in plan.spans:
            name = span.sequence.sequence_id
            sampled[name] = SampledToken(0 if span.sequence.num_output + 1 >= lengths[name] else 1)
        scheduler.apply(plan, sampled, 0.0)
    return {
        "steps": len(running),
        "mean_running": statistics.mean(running),
        "mean_running_while_others_wait": statistics.mean(contended) if contended else 0.0,
    }


def measure(cases: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Every case once a round; for each quantity its value in each round."""
    results: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for quantity, value in case().items():
                results[name].setdefault(quantity, []).append(value)
    return results


def summary(values: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(rounds: int = 5, steps: int = 200, output: Path = ROOT / "benchmarks" / "results" / "scheduler.json") -> None:
    """Measures, prints a table, writes JSON."""
    decode = {
        f"{layout}, {size} running": (lambda w=windows, n=size: decode_round(w, n, max(48, steps * 256 // max(n, 256))))
        for layout, windows in LAYOUTS.items()
        for size in SIZES
    }
    prompts = {
        f"prompt of {length}, {'cached' if is_cached else 'new'}": (lambda n=length, c=is_cached: prompt_round(n, c))
        for length in (2048, 32768)
        for is_cached in (False, True)
    }
    results = measure({**decode, **prompts}, rounds)

    table = Table(title=f"Scheduler, milliseconds of CPU (median of {rounds} rounds, range)")
    for column, justify in (("case", "left"), ("plan", "right"), ("apply", "right"), ("plan + apply", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, quantities in results.items():
        cells = []
        for quantity in ("plan", "apply", "step"):
            s = summary(quantities[quantity]) if quantity in quantities else None
            cells.append("" if s is None else f"{s['median_ms']:.3f} ({s['min_ms']:.3f}..{s['max_ms']:.3f})")
        table.add_row(name, *cells)
    Console(width=110).print(table)

    policies = {
        "continuous admission, 16 slots": policy_run(16, 4096, "continuous", "paged"),
        "static admission, 16 slots": policy_run(16, 4096, "static", "paged"),
        "blocks on demand, 256 blocks": policy_run(64, 256, "continuous", "paged"),
        "blocks for max_tokens, 256 blocks": policy_run(64, 256, "continuous", "max_length"),
    }
    counts = Table(title="Policies: 64 sequences, prompts of 32, up to 512 tokens, lognormal lengths")
    for column in ("policy", "steps", "running", "running while others wait"):
        counts.add_column(column)
    for name, count in policies.items():
        means = (count["mean_running"], count["mean_running_while_others_wait"])
        counts.add_row(name, f"{count['steps']}", *(f"{mean:.1f}" for mean in means))
    Console(width=110).print(counts)

    record = {
        "benchmark": "scheduler",
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "commit": commit(),
        "clock": "CPU time of the thread",
        "rounds": rounds,
        "policies": policies,
        "results": {
            name: {q: summary(values) for q, values in quantities.items()} for name, quantities in results.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
