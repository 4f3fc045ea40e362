"""``python -m benchmarks.chaos``: load, faults from a seed, and every answer compared with the fault-free one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.chaos.plain.cluster import plain
from benchmarks.chaos.plan import Kind, faults
from benchmarks.chaos.plot import save_plot
from benchmarks.chaos.report import figures, is_good, table
from benchmarks.chaos.run import Experiment, Settings
from benchmarks.chaos.served import Shape, served
from benchmarks.hardware import hardware_record
from rich.console import Console


def main(
    seed: Annotated[int, typer.Option(help="Of faults and requests.")] = 0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Faults come for so long.")] = 5.0,
    num_faults: Annotated[int, typer.Option("--faults", min=0, help="At most so many.")] = 10**9,
    kinds: Annotated[str, typer.Option(help="Only these faults, separated by commas; default: all.")] = "",
    groups: int = 1,
    dp: int = 3,
    tp: int = 1,
    gateways: int = 2,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Different ones, each asked many times.")] = 40,
    without_ray: Annotated[
        bool, typer.Option("--without-ray", help="Plain processes: faults come much faster.")
    ] = False,
    hosts: Annotated[
        bool, typer.Option("--hosts", help="The same, each seat on a host of its own. Needs root.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="Where the plain processes' log is kept.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/chaos.json"),
) -> None:
    """Ends with 1 when a request was lost, an answer differed, or something was left over."""
    console = Console()
    chosen = [Kind(name.strip()) for name in kinds.split(",")] if kinds else list(Kind)
    shape = Shape(groups, dp, tp, gateways)
    settings = Settings(seed, clients, requests, num_faults, minutes * 60.0)

    def tell(line: str) -> None:
        console.print(line, highlight=False)

    started = plain(shape, hosts, log) if without_ray or hosts else served(shape)
    with started as system:
        result = asyncio.run(Experiment(system, settings, faults(seed, chosen), tell).run())
    told = figures(result)
    console.print(table(told))
    for line in [*told["skipped"], *told["wrong"]]:
        tell(line)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "hardware": hardware_record(),
        "settings": {
            **asdict(settings),
            **asdict(shape),
            "kinds": [kind.value for kind in chosen],
            "ray": not (without_ray or hosts),
            "hosts": hosts,
        },
        "results": told,
    }
    output.write_text(json.dumps(record, indent=2) + "\n")
    title = f"seed {seed}, {groups} group(s) of dp {dp} x tp {tp}, {gateways} gateways, {clients} clients"
    save_plot(result, output.with_suffix(".png"), title)
    raise typer.Exit(0 if is_good(result) else 1)


if __name__ == "__main__":
    typer.run(main)
