"""What continuous batching and a paged cache are worth: the same engine with one policy switched.

    python -m benchmarks.batching

Continuous against static admission: 64 requests with lognormal output lengths, all waiting at the start. Three figures:
steps of the engine, which no machine distorts, and wall time on two MoE checkpoints. ``demo`` fits into the
processor's cache, so a step costs nearly the same for any number of sequences, as on a GPU at larger batches; a step of
``tiny`` reads more experts from memory the more sequences it holds, which is kinder to half-empty batches.

Paged against reserved for the maximum length: how many sequences run at once under a fixed KV budget while others still
wait, when answers may be as long as ``MAX_OUTPUT`` and end earlier by themselves.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from benchmarks.checkpoints import checkpoint
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.cluster.bench.lengths import parse_lengths
from moestro.cluster.bench.seeds import round_seed
from moestro.cluster.bench.workload import RandomPrompts, Workload
from moestro.demo.paths import MODEL_DIR
from moestro.protos.sequences import EngineLimits, SamplingParams, SequenceRequest
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Runner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

PROMPT = "32"
MAX_OUTPUT = 768
OUTPUT = f"lognormal:mean=64,cv=1.2,max={MAX_OUTPUT}"
NUM_REQUESTS = 64
BATCH = 16  # sequences at once, for both ways of admission
BLOCK_SIZE = 16
KV_TOKENS = 8192  # the fixed budget of the second comparison: ten sequences of the maximum length
VOCABULARY = 4096
NUM_BLOCKS = 1024
BASE = SchedulerConfig(
    groups=(CacheGroup(None, NUM_BLOCKS),),
    block_size=BLOCK_SIZE,
    max_num_sequences=BATCH,
    max_num_tokens=1024,
    max_context=832,
    max_waiting=NUM_REQUESTS,
)


def requests(seed: int) -> list[SequenceRequest]:
    """The workload of one round: the same for both policies."""
    workload = Workload(
        seed, RandomPrompts(parse_lengths("--input", PROMPT), VOCABULARY), parse_lengths("--output", OUTPUT)
    )
    drawn = [workload.request(index) for index in range(NUM_REQUESTS)]
    return [
        SequenceRequest(
            str(index),
            tuple(request.prompt),
            SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True),
        )
        for index, request in enumerate(drawn)
    ]


def engine(model: Decoder, cache: KVCache, config: SchedulerConfig) -> Engine:
    limits = EngineLimits(VOCABULARY, config.context_limit, config.max_waiting)
    return Engine(Scheduler(config), Runner(model, cache, torch.device("cpu")), limits)


def compare_admission(name: str, rounds: int, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Static and continuous admission on one checkpoint, interleaved."""
    model = load_model(MODEL_DIR if name == "demo" else checkpoint(name, folder))
    cache = model.cache_spec.allocate(NUM_BLOCKS, BLOCK_SIZE)
    rows = []
    for number in range(-1, rounds):  # round -1 warms up and is not counted
        work = requests(round_seed(seed, number + 1))
        tokens = sum(request.sampling.max_tokens for request in work)
        static = run(engine(model, cache, replace(BASE, admission="static")), work)
        continuous = run(engine(model, cache, BASE), work)
        rows.append(
            {
                "static_tokens_per_s": tokens / static.seconds,
                "continuous_tokens_per_s": tokens / continuous.seconds,
                "throughput_ratio": static.seconds / continuous.seconds,
                "step_ratio": static.steps / continuous.steps,
            }
        )
    return spread(rows[1:])


def compare_memory(rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Sequences running under a fixed KV budget; the same on every machine, since only the scheduler decides it."""
    model = load_model(MODEL_DIR)
    cache = model.cache_spec.allocate(NUM_BLOCKS, BLOCK_SIZE)
    budget = replace(BASE, groups=(CacheGroup(None, KV_TOKENS // BLOCK_SIZE + 1),), max_num_sequences=NUM_REQUESTS)
    rows = []
    for number in range(rounds):
        work = requests(round_seed(seed, number + 1))
        lengths = {request.sequence_id: request.sampling.max_tokens for request in work}
        reserved = run(engine(model, cache, replace(budget, reservation="max_length")), open_ended(work), lengths)
        paged = run(engine(model, cache, budget), open_ended(work), lengths)
        running = statistics.mean(reserved.running), statistics.mean(paged.running)
        rows.append({"reserved_running": running[0], "paged_running": running[1], "ratio": running[1] / running[0]})
    return spread(rows)


def open_ended(work: list[SequenceRequest]) -> list[SequenceRequest]:
    """The same requests as a server sees them whose clients do not know how long the answer will be."""
    return [replace(request, sampling=replace(request.sampling, max_tokens=MAX_OUTPUT)) for request in work]


class Run(NamedTuple):
    """``running`` is the number of running sequences in each step during which somebody waited."""

    seconds: float
    steps: int
    running: list[int]


def run(engine: Engine, work: list[SequenceRequest], lengths: dict[str, int] | None = None) -> Run:
    """Runs until all have ended. With ``lengths`` each sequence is ended from outside at its own length, as a stop
    string would."""
    left = dict(lengths or {})
    for request in work:
        refusal = engine.add(request, 0.0)
        if refusal is not None:
            raise RuntimeError(refusal)
    running = []
    start = time.perf_counter()
    while engine.has_work:
        for delta in engine.step(time.monotonic):
            if delta.sequence_id in left:
                left[delta.sequence_id] -= len(delta.token_ids)
                if left[delta.sequence_id] == 0:
                    engine.cancel(delta.sequence_id)
        load = engine.load()
        if load.num_waiting:
            running.append(load.num_running)
    return Run(time.perf_counter() - start, engine.load().num_steps, running)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path(".cache/checkpoints"),
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/batching.json"),
) -> None:
    """Both comparisons, interleaved; median and range over rounds."""
    torch.set_num_threads(threads)
    results = {f"admission, {name}": compare_admission(name, rounds, seed, folder) for name in ("demo", "tiny")}
    results["memory"] = compare_memory(rounds, seed)
    table = Table("figure", "median", "range", title="one policy switched")
    for part, figures in results.items():
        for name, figure in figures.items():
            table.add_row(f"{part}: {name}", f"{figure['median']:.2f}", f"{figure['min']:.2f} to {figure['max']:.2f}")
    Console().print(table)
    settings = {"prompt": PROMPT, "output": OUTPUT, "requests": NUM_REQUESTS, "batch": BATCH, "kv_tokens": KV_TOKENS}
    record = {
        "hardware": hardware_record(),
        "settings": settings | {"threads": threads, "rounds": rounds, "seed": seed},
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
