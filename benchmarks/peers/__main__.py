"""Ours beside the peers on a CPU, in one run.

python -m benchmarks.peers build     # a virtual environment for each peer, when missing; the checkpoints
python -m benchmarks.peers run       # builds first; the tables, the JSON and the plot
python -m benchmarks.peers show      # the tables of a saved run
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmarks.checkpoints import checkpoint
from benchmarks.hardware import hardware_record
from benchmarks.peers.environments import ENVIRONMENTS, CannotBuild, build, python_of
from benchmarks.peers.machine import best_of, measure_machine
from benchmarks.peers.measure import Plan, load_rates, measure_batches, measure_load, start_field
from benchmarks.peers.plot import save_plot
from benchmarks.peers.quiet import Patience
from benchmarks.peers.report import show as show_record
from benchmarks.peers.roster import ROOT, ROSTER, Contestant
from benchmarks.peers.summary import EXTRAS, batch_cells, load_cells
from rich.console import Console

from moestro.workers.architectures import parse_config

app = typer.Typer(add_completion=False)
console = Console(width=None if Console().is_terminal else 200)

Cache = Annotated[Path, typer.Option(help="Where the peers' environments are, a folder or link each.")]
Checkpoints = Annotated[Path, typer.Option(help="Where checkpoints are kept.")]
CACHE, CHECKPOINTS, OUTPUT = Path(".cache/peers"), Path(".cache/checkpoints"), Path("benchmarks/results/peers.json")


@app.command("build")
def build_command(cache: Cache = CACHE, models: str = "tiny,mid", folder: Checkpoints = CHECKPOINTS) -> None:
    """The environments and the checkpoints, as far as they are missing; what cannot be had is said."""
    missing = build_environments(cache, ROSTER)
    for name in models.split(","):
        prepare(name, folder, cache, missing)
    raise typer.Exit(1 if missing else 0)


@app.command()
def run(
    models: Annotated[str, typer.Option(help="Comma-separated names of benchmarks.checkpoints.")] = "tiny,mid",
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,4,16,64",
    engines: Annotated[str, typer.Option(help="Comma-separated; ours, transformers, vllm, llama.cpp.")] = ",".join(
        ROSTER
    ),
    rounds: Annotated[str, typer.Option(help="Of each batch size, or one number for all.")] = "5,5,3,2",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    load_s: Annotated[float, typer.Option(help="About how long the requests of a load arrive, in seconds.")] = 10.0,
    load_rounds: Annotated[int, typer.Option(help="Rounds under load; 0 for none.")] = 3,
    wait_s: Annotated[float, typer.Option(help="How long a turn waits for other work on the machine to pause.")] = 2.0,
    repeats: Annotated[int, typer.Option(help="How often a turn that others disturbed is done again.")] = 1,
    seed: int = 0,
    cache: Cache = CACHE,
    folder: Checkpoints = CHECKPOINTS,
    output: Annotated[Path, typer.Option()] = OUTPUT,
) -> None:
    """Builds what is missing, measures, writes the JSON and, beside it, the plot. Checkpoints that the JSON has from
    another run and that are not among ``--models`` stay in it."""
    contestants = {name: ROSTER[name] for name in engines.split(",")}
    patience = Patience(wait_s=wait_s, repeats=repeats)
    plan = Plan(rounds_by_batch(batches, rounds), seed, threads, load_s, load_rounds, patience)
    missing = build_environments(cache, contestants)
    about = {
        "hardware": hardware_record(),
        "settings": asdict(plan),
        "engines": {name: each.how for name, each in contestants.items()},
        "versions": {name: dict(each.pins) for name, each in ENVIRONMENTS.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"models": {}}
    for name in models.split(","):
        failures = dict(missing)
        path = prepare(name, folder, cache, failures)
        record["models"][name] = about | measure(path, contestants, failures, plan, cache)
        output.write_text(json.dumps(record, indent=2) + "\n")
    show_record(record, console)
    save_plot(record, output.with_suffix(".png"))


@app.command()
def show(record: Annotated[Path, typer.Argument()] = OUTPUT) -> None:
    """The tables of a saved run; nothing is measured."""
    show_record(json.loads(record.read_text()), console)


def rounds_by_batch(batches: str, rounds: str) -> dict[int, int]:
    """``"1,16"`` and ``"5,3"`` or ``"5"``."""
    sizes, counts = ([int(each) for each in text.split(",")] for text in (batches, rounds))
    if len(counts) == 1:
        counts *= len(sizes)
    if len(counts) != len(sizes) or min(counts) < 1 or sizes != sorted(set(sizes)):
        raise typer.BadParameter(f"--rounds must be one number or one for each of rising --batches, got {rounds}")
    return dict(zip(sizes, counts, strict=True))


def build_environments(cache: Path, contestants: Mapping[str, Contestant]) -> dict[str, str]:
    """Builds what is missing; the engines that cannot be had, and why."""
    missing = {}
    for name, each in contestants.items():
        if each.environment is not None:
            try:
                made = build(ENVIRONMENTS[each.environment], cache / each.environment)
                console.print(f"{name}: environment {'built' if made else 'ready'}")
            except CannotBuild as error:
                missing[name] = f"no environment: {error}"
                console.print(f"{name}: {missing[name]}")
    return missing


def prepare(name: str, folder: Path, cache: Path, missing: dict[str, str]) -> Path:
    """The checkpoint, and beside it as GGUF for llama.cpp; a failure to write that goes to ``missing``."""
    path = checkpoint(name, folder)
    if "llama.cpp" not in missing and not list(path.glob("*.gguf")):
        command = [python_of(cache / "llama"), "-m", "benchmarks.peers.gguf_file", path.absolute()]
        done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        if done.returncode != 0:
            missing["llama.cpp"] = f"no GGUF: {done.stderr.strip().splitlines()[-1]}"
    return path


def measure(
    path: Path, contestants: Mapping[str, Contestant], missing: Mapping[str, str], plan: Plan, cache: Path
) -> dict[str, Any]:
    """Everything about one checkpoint."""
    config = parse_config(json.loads((path / "config.json").read_text()))
    field = start_field(contestants, missing, path, config, plan, cache)
    try:
        before = measure_machine(plan.threads)
        rows = list(measure_batches(field, plan, console.print))
        rates = load_rates(rows, contestants) if plan.load_rounds else {}
        loads = [row for rate, names in rates.items() for row in measure_load(field, plan, rate, names, console.print)]
        memory = {name: asdict(each) for name, each in field.memory().items()}
        machine = best_of(before, measure_machine(plan.threads))
    finally:
        field.close()
    cells = batch_cells(rows, config, machine)
    return {
        "machine": asdict(machine),
        "cells": cells,
        "loads": load_cells(loads),
        "memory": memory,
        "agreement": mean_agreement(rows),
        "failures": field.failures,
        "rows": rows,
    }


def mean_agreement(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each engine with transformers, over all cells."""
    result: dict[str, dict[str, float]] = {}
    for name in {row["engine"] for row in rows}:
        own = [row for row in rows if row["engine"] == name and EXTRAS[1] in row]
        result[name] = {key: sum(row[key] for row in own) / len(own) for key in EXTRAS[1:]} if own else {}
    return result


if __name__ == "__main__":
    app()
