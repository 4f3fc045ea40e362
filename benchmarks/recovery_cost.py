"""What it costs to be ready for faults while none comes: this tree against an older one, side by side.

Two clusters, each started as a user would from its own tree, answer the same load in turns while the other one idles.
Ratios are of one round; the order changes from round to round.

    git worktree add /tmp/before 8198bd1
    python -m benchmarks.recovery_cost /tmp/before
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.chaos.load import Load, fault_free
from benchmarks.chaos.records import Verdict
from benchmarks.chaos.requests import Mix, build_pool
from benchmarks.chaos.served import ROOT, Served, Shape, served
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console

from moestro.cluster.client import AsyncClient
from moestro.cluster.verify.suite import TEXTS

STEADY = Mix(prompt=(64, 64), output=(96, 96), cancelled=0.0, whole=0.0, kinds=3)
SETTLE_S = 1.0  # at both ends of a turn, when streams begin and end


async def tokens_per_s(system: Served, clients: int, seconds: float, seed: int) -> float:
    """Under a closed loop, counted in the middle of a turn. Raises RuntimeError when an answer is wrong."""
    async with AsyncClient(system.address, 60.0) as client:
        (model,) = await client.models()
        pool = build_pool(model, [await client.tokenize(text) for text in TEXTS], 6, seed, STEADY)
        expected = await fault_free(client, pool)
    load = Load(system.address, pool, expected, seed, STEADY, 60.0)
    running = asyncio.create_task(load.run(clients))
    await asyncio.sleep(SETTLE_S)
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    end = time.monotonic()
    load.stop()
    await running
    if wrong := [record.detail for record in load.records if record.verdict is not Verdict.EQUAL]:
        raise RuntimeError(wrong[0])
    arrivals = [pair for record in load.records for pair in zip(record.arrivals_s, record.tokens, strict=True)]
    return sum(tokens for at_s, tokens in arrivals if begin <= at_s < end) / (end - begin)


def main(
    before: Annotated[Path, typer.Argument(help="A checkout of the older tree.")],
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = 8.0,
    clients: int = 8,
    dp: int = 2,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/recovery_cost.json"),
) -> None:
    """Tokens/s of both, and the ratio round by round."""
    console, shape, rows = Console(), Shape(1, dp, 1, gateways=1), []
    with ExitStack() as stack:
        systems = {
            "before": stack.enter_context(served(shape, root=before.resolve())),
            "now": stack.enter_context(served(shape, root=ROOT)),
        }
        for number in range(-1, rounds):  # the first warms up
            names = list(systems) if number % 2 else list(reversed(systems))
            row = {name: asyncio.run(tokens_per_s(systems[name], clients, seconds, seed)) for name in names}
            if number >= 0:
                rows.append({**row, "ratio": row["now"] / row["before"]})
                console.print(
                    f"{number + 1:3}: {row['before']:.0f}, {row['now']:.0f} tokens/s, {rows[-1]['ratio']:.3f}"
                )
    results = spread(rows)
    console.print(f"median ratio {results['ratio']['median']:.3f}, goal at least 0.99")
    settings = {"rounds": rounds, "seconds": seconds, "clients": clients, "seed": seed, **asdict(shape)}
    record = {"hardware": hardware_record(), "settings": settings, "results": results, "rounds": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
