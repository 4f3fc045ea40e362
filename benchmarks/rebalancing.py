"""What moving experts is worth while the traffic shifts, on four CPU ranks.

Two groups of four ranks serve the same themed model (``themed_model.py``) with the same placement at the start, one
with the rebalancer on and one without. Both run each phase, one after the other, so that they see the same machine:

    theme 0     every request needs the experts of rank 0
    theme 3     the traffic shifts: every request needs those of rank 3
    all themes  balanced traffic

A phase begins with a warm-up that counts as its own figure ("shift"): there the rebalancer pays and has not gained yet.

    python -m benchmarks.rebalancing
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmarks.group_processes import Group, Measured, Phase
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from benchmarks.themed_model import checkpoint, prompt
from rich.console import Console
from rich.table import Table

PROMPT, OUTPUT, IN_FLIGHT, RANKS = 192, 8, 4, 4
# A phase lasts seconds here and not hours, so everything that is told in seconds is shorter than by default.
QUICK = {"window_s": 8.0, "interval_s": 2.0, "horizon_s": 90.0, "settle_s": 4.0, "backoff_s": 20.0, "bytes_per_s": 64e6}
PHASES: dict[str, tuple[int, ...]] = {"theme 0": (0,), "theme 3": (3,), "all themes": (0, 1, 2, 3)}


def prompts(themes: tuple[int, ...], rng: random.Random) -> list[int]:
    return prompt(themes, PROMPT, rng)


def figures(measured: list[Measured]) -> dict[str, float]:
    gaps = sorted(gap for one in measured for gap in one.gaps)
    return {
        "tokens_per_s": sum(one.tokens / one.seconds for one in measured),
        "p99_itl_s": statistics.quantiles(gaps, n=100)[98] if len(gaps) > 1 else 0.0,
        "observing_share": sum(one.observing_s for one in measured) / sum(one.steps_s for one in measured),
    }


def _mib(rows: list[dict[str, float]]) -> str:
    return ", ".join(f"{row['moved_bytes'] / 2**20:.0f} MiB" for row in rows)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    shift_s: Annotated[float, typer.Option(help="Seconds after a shift, counted apart.")] = 25.0,
    settled_s: Annotated[float, typer.Option(help="Seconds of a phase once it has settled.")] = 10.0,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path(".cache/checkpoints"),
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/rebalancing.json"),
) -> None:
    """Both groups through all phases, interleaved; median and range over rounds."""
    model = str(checkpoint(folder, seed))
    console = Console()
    base = {"model": model, "device": "cpu", "kv_bytes": 64 * 2**20, "max_num_sequences": 16, "max_num_tokens": 256}
    rows: dict[str, list[dict[str, float]]] = {}
    moved: dict[str, list[dict[str, float]]] = {}
    reports: dict[str, Any] = {}
    with (
        Group(base, QUICK, RANKS, "benchmarks.rebalancing:prompts", seed) as on,
        Group(base, {"enabled": False}, RANKS, "benchmarks.rebalancing:prompts", seed) as off,
    ):
        for turn in range(rounds):
            for name, themes in PHASES.items():
                before = on.report()["rebalancer"]["moved_bytes"]
                for part, seconds in (("shift", shift_s), ("settled", settled_s)):
                    phase = Phase(name, seconds, themes, IN_FLIGHT, OUTPUT)
                    with_it, without = figures(on.run(phase)), figures(off.run(phase))
                    row = {"with": with_it["tokens_per_s"], "without": without["tokens_per_s"]}
                    row["ratio"] = row["with"] / row["without"]
                    row["observing_share"] = with_it["observing_share"]
                    row["p99_itl_ratio"] = with_it["p99_itl_s"] / without["p99_itl_s"]
                    rows.setdefault(f"{name}, {part}", []).append(row)
                    console.print(f"round {turn + 1}, {name}, {part}: {row['ratio']:.2f}", highlight=False)
                bytes_moved = on.report()["rebalancer"]["moved_bytes"] - before
                moved.setdefault(name, []).append({"moved_bytes": float(bytes_moved)})
        reports = {"with": on.report(), "without": off.report()}
    results = {name: spread(some) for name, some in rows.items()}
    table = Table(
        "phase", "with", "without", "ratio", "range", "p99 ITL ratio", "observing", title="tokens/s, four ranks"
    )
    for name, figure in results.items():
        ratio = figure["ratio"]
        table.add_row(
            name,
            f"{figure['with']['median']:.0f}",
            f"{figure['without']['median']:.0f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} to {ratio['max']:.2f}",
            f"{figure['p99_itl_ratio']['median']:.2f}",
            f"{figure['observing_share']['median']:.2%}",
        )
    console.print(table)
    for name, figure in moved.items():
        console.print(f"{name}: {_mib(figure)} moved", highlight=False)
    record = {
        "hardware": hardware_record(),
        "settings": {
            "rounds": rounds, "shift_s": shift_s, "settled_s": settled_s, "seed": seed, "prompt": PROMPT,
            "output": OUTPUT, "in_flight_per_rank": IN_FLIGHT, "ranks": RANKS, "rebalance": QUICK,
        },
        "results": results,
        "moved": {name: spread(some) for name, some in moved.items()},
        "decisions": reports["with"]["decisions"],
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
