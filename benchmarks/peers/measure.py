"""The run itself: for each checkpoint all engines are started, and take turns cell by cell, round by round."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.costs import cache_bytes
from benchmarks.peers.field import Field
from benchmarks.peers.process import Worker
from benchmarks.peers.quiet import Patience
from benchmarks.peers.roster import REFERENCE, ROOT, Contestant, command, variables
from benchmarks.peers.workload import MAX_LENGTH, batch_work, load_work, rotated

from moestro.workers.model_config import ModelConfig

Row = dict[str, Any]
Say = Callable[[str], None]

START_TIMEOUT_S = 900.0  # vLLM compiles on its first start
TURN_TIMEOUT_S = 300.0
WARM_UP_ROUND, WARM_UP_PROMPT, WARM_UP_OUTPUT = 1 << 20, 32, 4  # short, so that large batches do not take minutes
SPARE = 17 / 16  # blocks that an engine keeps for itself
FEWEST_REQUESTS, MOST_REQUESTS = 8, 200
UTILISATION = 0.5  # of what the slowest engine asked can do


@dataclass(frozen=True, slots=True)
class Plan:
    """``rounds`` by batch size: large batches take longer and vary less. ``load_s``: about how long the requests of one
    load keep arriving, in each of ``load_rounds``."""

    rounds: Mapping[int, int]
    seed: int
    threads: int
    load_s: float
    load_rounds: int
    patience: Patience


def start_field(
    contestants: Mapping[str, Contestant],
    missing: Mapping[str, str],
    model: Path,
    config: ModelConfig,
    plan: Plan,
    cache: Path,
) -> Field:
    """``missing``: engines that have no environment, and why. All get the same room for keys and values."""
    field = Field(plan.patience, missing)
    cores = tuple(sorted(os.sched_getaffinity(0)))[: plan.threads]
    request = {
        "op": "load",
        "model": str(model.resolve()),
        "threads": plan.threads,
        "max_sequences": max(plan.rounds),
        "max_length": MAX_LENGTH,
        "cache_bytes": cache_bytes(config, round(max(plan.rounds) * MAX_LENGTH * SPARE)),
    }
    for name, each in contestants.items():
        if name not in missing:

            def make(name: str = name, each: Contestant = each) -> Worker:
                log = cache / "logs" / f"{model.name}-{name}.log"
                return Worker(command(each, cache), variables(each, cores), log, ROOT)

            field.start(name, make, request, START_TIMEOUT_S)
    return field


def measure_batches(field: Field, plan: Plan, say: Say) -> Iterator[Row]:
    """One row an engine, batch size and round; each batch size is warmed up first by turns that are not counted."""
    for batch in plan.rounds:
        prompts = [prompt[:WARM_UP_PROMPT] for prompt in batch_work(plan.seed, WARM_UP_ROUND, batch).prompts]
        for name in field.names:
            field.ask(name, {"op": "batch", "prompts": prompts, "num_output": WARM_UP_OUTPUT}, TURN_TIMEOUT_S)
    for number in range(max(plan.rounds.values())):
        for batch, rounds in plan.rounds.items():
            if number < rounds:
                say(f"batch {batch}, round {number + 1} of {rounds}")
                yield from _batch_round(field, plan, number, batch)


def _batch_round(field: Field, plan: Plan, number: int, batch: int) -> list[Row]:
    work = batch_work(plan.seed, number, batch)
    request = {"op": "batch", "prompts": work.prompts, "num_output": work.num_output}
    prompt_tokens = len(work.prompts[0])
    rows, tokens = [], {}
    for name in rotated(field.names, number):
        turn = field.ask(name, request, TURN_TIMEOUT_S)
        if turn is None:
            continue
        answer = turn.answer
        tokens[name] = answer["tokens"]
        rows.append(
            {
                "engine": name,
                "batch": batch,
                "round": number,
                "prompt_tokens": prompt_tokens,
                "output_tokens": work.num_output,
                "prefill_tokens_per_s": batch * prompt_tokens / answer["prefill_s"],
                "decode_tokens_per_s": answer["num_decoded"] / answer["decode_s"],
                "requests_per_s": batch / (answer["prefill_s"] + answer["decode_s"]),
                "others_cores": turn.others_cores,
            }
        )
    for row in rows:
        if REFERENCE in tokens:
            row |= agreement(tokens[row["engine"]], tokens[REFERENCE])
    return rows


def agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, float]:
    """Share of sequences whose first token is the reference's, and the mean share of each output before it first
    differs. Random weights leave many near ties, where bf16 in another order of sums picks another token."""
    pairs = list(zip(tokens, reference, strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return {
        "first_tokens_equal": sum(length > 0 for length in same) / len(pairs),
        "prefix_equal": sum(length / len(pair[0]) for length, pair in zip(same, pairs, strict=True)) / len(pairs),
    }


def measure_load(field: Field, plan: Plan, rate: float, names: Sequence[str], say: Say) -> Iterator[Row]:
    """One row an engine and round: all latencies of that round's requests."""
    count = round(min(MOST_REQUESTS, max(FEWEST_REQUESTS, rate * plan.load_s)))
    timeout_s = TURN_TIMEOUT_S + count / rate
    for number in range(plan.load_rounds):
        say(f"{rate:.2f} requests/s, round {number + 1} of {plan.load_rounds}")
        request = {"op": "load_test", "requests": load_work(plan.seed, number, rate, count)}
        for name in rotated([each for each in field.names if each in names], number):
            turn = field.ask(name, request, timeout_s)
            if turn is not None:
                yield {"engine": name, "rate": rate, "round": number, **turn.answer, "others_cores": turn.others_cores}


def load_rates(rows: Sequence[Row], contestants: Mapping[str, Contestant]) -> dict[float, list[str]]:
    """Rates of arrival and who is asked to bear them: one that all can, and one that all with continuous batching can.
    What an engine can do is its best batch's requests per second; without continuous batching, batch 1's."""
    able: dict[str, float] = {}
    for row in rows:
        if contestants[row["engine"]].continuous or row["batch"] == 1:
            able[row["engine"]] = max(able.get(row["engine"], 0.0), row["requests_per_s"])
    groups = [sorted(name for name in able if contestants[name].continuous), sorted(able)]
    return {UTILISATION * min(able[name] for name in group): group for group in groups if group}
