"""What the engine costs the host beside the model, against vLLM v1's scheduler, and how it grows.

    python -m benchmarks.overhead [--rounds 5] [--vllm .cache/peers/vllm/bin/python]

Times are CPU time of the thread: the host's part computes and never waits, and the wall clock would measure who else
uses the machine. Sizes and the two schedulers take turns within each round; ratios are of one round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.hardware import hardware_record
from benchmarks.overhead.growth import CURVES, slope, waiting_memory
from benchmarks.overhead.host_path import PARTS, host_round, scheduler_round
from benchmarks.overhead.load import BLOCK_SIZE, PROMPT_TOKENS
from benchmarks.overhead.model_steps import step_us
from benchmarks.overhead.plot import plot
from benchmarks.overhead.vllm_peer import VllmScheduler
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

VLLM = Path(".cache/peers/vllm/bin/python")
SIZES = (1, 64, 256, 1024, 4096)
REAL_STEPS = {"tiny": (1, 64, 256, 1024), "mid": (1, 64)}
WAITING_TOKENS = (100, 1000)
Rows = dict[int, list[dict[str, float]]]


def steps_of(size: int) -> int:
    return max(32, min(256, 16_384 // size))


def measure(rounds: int, peer: VllmScheduler | None) -> tuple[Rows, Rows]:
    """By number of running sequences and round: the parts of the host path; and the schedulers alone."""
    parts: Rows = {size: [] for size in SIZES}
    schedulers: Rows = {size: [] for size in SIZES}
    for number in range(-1, rounds):  # round -1 warms up and is not counted
        for size in SIZES:
            row = host_round(size, steps_of(size))
            ours = scheduler_round(size, steps_of(size))
            both = {"plan": ours["plan"], "apply": ours["apply"], "ours": ours["step"]}
            if peer is not None:
                theirs = peer.measure(size, steps_of(size))
                both |= {"schedule": theirs["schedule"], "update": theirs["update"], "vllm": theirs["step"]}
                both["ratio"] = both["ours"] / both["vllm"]
            if number >= 0:
                parts[size].append(row)
                schedulers[size].append(both)
    return parts, schedulers


def grown(rounds: int) -> list[dict[str, Any]]:
    """Every curve, point by point in turn."""
    costs: list[dict[int, list[dict[str, float]]]] = [{size: [] for size in curve.sizes} for curve in CURVES]
    for _ in range(rounds):
        for curve, rows in zip(CURVES, costs, strict=True):
            for size in curve.sizes:
                rows[size].append({"us": curve.case(size)})
    results = []
    for curve, rows in zip(CURVES, costs, strict=True):
        medians = {size: spread(values)["us"] for size, values in rows.items()}
        rising = slope({size: cost["median"] for size, cost in medians.items()})
        results.append({"title": curve.title, "of": curve.of, "slope": rising, "us": medians})
    return results


def show(record: dict[str, Any]) -> None:
    console = Console(width=130)
    real = record["real_step_us"]
    shares = [f"of {name}" for name in real]
    table = Table("running", *PARTS, "step", *shares, title="Host time of a decode step, µs of CPU (medians)")
    for size, parts in record["host_us"].items():
        whole = parts["step"]["median"]
        cells = [f"{whole / (steps[size] + whole):.2%}" if size in steps else "" for steps in real.values()]
        table.add_row(str(size), *(f"{parts[part]['median']:.1f}" for part in (*PARTS, "step")), *cells)
    console.print(table)
    table = Table("running", "plan", "apply", "both", "schedule", "update", "both", "ours / vLLM (range)")
    table.title = "The schedulers alone, µs of CPU: ours, and vLLM's"
    for size, figures in record["schedulers_us"].items():
        medians = {name: f"{figure['median']:.1f}" for name, figure in figures.items()}
        cells = [medians.get(name, "") for name in ("plan", "apply", "ours", "schedule", "update", "vllm")]
        ratio = figures.get("ratio")
        cells.append("" if ratio is None else f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
        table.add_row(str(size), *cells)
    console.print(table)
    table = Table("what", "over", "µs", "slope", title="Growth")
    for curve in record["growth"]:
        points = ", ".join(f"{size:,}: {cost['median']:,.1f}" for size, cost in curve["us"].items())
        table.add_row(curve["title"], curve["of"], points, f"{curve['slope']:.2f}")
    console.print(table)
    table = Table("tokens", "allocated", "resident", title="1,000 waiting requests, MB")
    for tokens, sizes in record["waiting_1000"].items():
        table.add_row(str(tokens), *(f"{size / 1e6:.2f}" for size in sizes.values()))
    console.print(table)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    vllm: Annotated[Path, typer.Option(help="Interpreter that has vLLM; without it ours is measured alone.")] = VLLM,
    threads: Annotated[int, typer.Option(min=1, help="Of the real models' steps.")] = 2,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/overhead.json"),
) -> None:
    """Measures, prints tables, writes JSON and, beside it, a PNG."""
    torch.set_num_threads(1)
    version = None
    with torch.inference_mode():
        if vllm.exists():
            with VllmScheduler(vllm) as peer:
                version = peer.version
                parts, schedulers = measure(rounds, peer)
        else:
            typer.echo(f"{vllm} is not there: measured without vLLM", err=True)
            parts, schedulers = measure(rounds, None)
        growth = grown(max(1, rounds // 2))
    torch.set_num_threads(threads)
    record = {
        "benchmark": "overhead",
        "hardware": hardware_record(),
        "clock": "CPU time of the thread; real steps: wall clock",
        "settings": {"rounds": rounds, "prompt_tokens": PROMPT_TOKENS, "block_size": BLOCK_SIZE, "threads": threads},
        "vllm": version,
        "host_us": {size: spread(rows) for size, rows in parts.items()},
        "schedulers_us": {size: spread(rows) for size, rows in schedulers.items()},
        "real_step_us": {name: step_us(name, batches) for name, batches in REAL_STEPS.items()},
        "growth": growth,
        "waiting_1000": {tokens: waiting_memory(tokens) for tokens in WAITING_TOKENS},
    }
    show(record)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    plot(growth, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
