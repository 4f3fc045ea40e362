"""How long it takes when a rank is killed, or stops: a cluster as a user starts it, under load, round after round.

told            until the cluster's status told of it
stayed          longest silence of each stream whose rank lived
moved           longest silence of each stream whose rank was lost
full strength   until every rank served again

python -m benchmarks.recovery
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.chaos.plain.cluster import plain
from benchmarks.chaos.plan import Fault, Kind
from benchmarks.chaos.plot import save_plot
from benchmarks.chaos.report import figures, is_good, table
from benchmarks.chaos.requests import Mix
from benchmarks.chaos.run import Experiment, Settings
from benchmarks.chaos.served import Shape, served
from benchmarks.hardware import hardware_record
from rich.console import Console

# Streams long enough to be open before, during and after; none is given up.
LONG = Mix(prompt=(16, 64), output=(300, 480), cancelled=0.0, whole=0.0, kinds=3)
PAUSE_S = 4.0  # at full strength, before the next
STOPPED_S = 12.0  # longer than the watchdog waits


def rounds_of(count: int) -> Iterator[Fault]:
    """Kill and stop in turn, each time another rank."""
    for number in range(2 * count):
        kind = (Kind.KILL_RANK, Kind.STOP_RANK)[number % 2]
        lasts_s = STOPPED_S if kind is Kind.STOP_RANK else 0.0
        yield Fault(number, kind, PAUSE_S, impatient=False, draw=number * 0.37 % 1.0, lasts_s=lasts_s)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 10,
    dp: int = 3,
    clients: Annotated[int, typer.Option(min=1)] = 9,
    seed: int = 0,
    without_ray: Annotated[bool, typer.Option("--without-ray", help="The same parts as plain processes.")] = False,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/recovery.json"),
) -> None:
    """Ends with 1 when a request was lost or an answer differed."""
    console = Console()
    shape = Shape(1, dp, 1, gateways=1)
    settings = Settings(seed, clients, requests=18, faults=2 * rounds, mix=LONG)

    def tell(line: str) -> None:
        console.print(line, highlight=False)

    started = plain(shape) if without_ray else served(shape)
    with started as system:
        result = asyncio.run(Experiment(system, settings, rounds_of(rounds), tell).run())
    told = figures(result)
    console.print(table(told))
    for line in told["wrong"]:
        tell(line)
    record = {
        "hardware": hardware_record(),
        "settings": {**asdict(settings), **asdict(shape), "ray": not without_ray},
        "results": told,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    save_plot(
        result, output.with_suffix(".png"), f"a rank killed and a rank stopped in turn, dp {dp}, {clients} streams"
    )
    raise typer.Exit(0 if is_good(result) else 1)


if __name__ == "__main__":
    typer.run(main)
