"""The placement solver beside DeepSeek's EPLB, on the same loads, in one run.

    git clone https://github.com/deepseek-ai/EPLB
    python -m benchmarks.placement --eplb EPLB

Popularity of experts is lognormal (sigma 1 of the logarithm: 128 experts in order over 8, 32 and 64 ranks then have a
balancedness of about 0.68, 0.37 and 0.23) and drifts: with every step each load is multiplied by a lognormal factor.
There is one spare slot a rank (two in the larger problem). Both solvers get the same loads after every step, and their
plans are judged by these; ours also gets its previous plan, which EPLB cannot use. Balancedness is mean over fullest
rank, averaged over layers, steps and seeds.

An expert counts as moved if a rank needs it that did not have it before: for EPLB this is the least that anyone who
runs it could move, by putting what stays on a rank into its old slot. Counted by slot, as it numbers them, it moves
more (``eplb_moved_by_slot``).
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from benchmarks.hardware import hardware_record
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moestro.router.balance import TOLERANCE, Topology, balance
from moestro.router.placement import Placement, moves, spread

Array = NDArray[np.float64]
Slots = NDArray[np.int64]  # layers, ranks, slots of a rank
SIGMA = 1.0
DRIFTS = (0.1, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class Problem:
    name: str
    layers: int
    experts: int
    ranks: int
    capacity: int
    groups: int = 1
    ranks_per_node: int = 8

    @property
    def topology(self) -> Topology:
        return Topology.regular(self.ranks, self.ranks_per_node)


PROBLEMS = (
    Problem("8 ranks", 20, 128, 8, 17),
    Problem("32 ranks", 20, 128, 32, 5),
    Problem("64 ranks", 20, 128, 64, 3),
    Problem("61 x 256, 32 ranks", 61, 256, 32, 10),
    Problem("same, 8 groups, 4 nodes", 61, 256, 32, 10, groups=8),
)


def eplb_slots(eplb: Any, problem: Problem, load_LE: Array) -> Slots:
    nodes = problem.ranks // problem.ranks_per_node
    slots = problem.ranks * problem.capacity
    experts, _, _ = eplb.rebalance_experts(torch.from_numpy(load_LE), slots, problem.groups, nodes, problem.ranks)
    return experts.view(problem.layers, problem.ranks, problem.capacity).numpy()


def our_slots(placements: tuple[Placement, ...]) -> Slots:
    return np.array([placement.slots for placement in placements])


def balancedness(load_LE: Array, slots: Slots) -> float:
    """Mean over layers. Not the router's own: EPLB may put one expert twice on a rank, which a Placement refuses."""
    values = []
    for load_E, slots_RC in zip(load_LE, slots, strict=True):
        copies = np.bincount(slots_RC[slots_RC >= 0], minlength=len(load_E))
        load_R = np.append(load_E / copies, 0.0)[slots_RC].sum(axis=1)
        values.append(load_R.mean() / load_R.max())
    return float(np.mean(values))


def least_moved(old: Slots, new: Slots) -> int:
    """Experts on ranks that did not have them, whatever the slots."""
    ranks = zip(old.reshape(-1, old.shape[2]).tolist(), new.reshape(-1, new.shape[2]).tolist(), strict=True)
    return sum(len(set(after) - set(before) - {-1}) for before, after in ranks)


def timed(times: list[float], solve: Callable[[], Any]) -> Any:
    start = time.thread_time()
    result = solve()
    times.append(time.thread_time() - start)
    return result


def drifting(eplb: Any, problem: Problem, drift: float, steps: int, seeds: int) -> dict[str, Any]:
    """Both solvers over the same drifting loads."""
    found: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {"eplb": [], "from_nothing": [], "with_previous": []}

    def record(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        load_LE = rng.lognormal(0.0, SIGMA, (problem.layers, problem.experts))
        naive = our_slots((spread(problem.experts, problem.ranks),) * problem.layers)
        record("naive", balancedness(load_LE, naive))
        theirs = timed(times["eplb"], lambda: eplb_slots(eplb, problem, load_LE))  # noqa: B023 called at once
        ours = timed(times["from_nothing"], lambda: solve(problem, load_LE, None))  # noqa: B023
        record("eplb_start", balancedness(load_LE, theirs))
        record("ours_start", balancedness(load_LE, our_slots(ours)))
        for _ in range(steps):
            load_LE = load_LE * rng.lognormal(0.0, drift, load_LE.shape)
            record("ours_if_nothing_moved", balancedness(load_LE, our_slots(ours)))
            before_theirs, before = theirs, ours
            theirs = timed(times["eplb"], lambda: eplb_slots(eplb, problem, load_LE))  # noqa: B023
            ours = timed(times["with_previous"], lambda: solve(problem, load_LE, before))  # noqa: B023
            record("eplb", balancedness(load_LE, theirs))
            record("ours", balancedness(load_LE, our_slots(ours)))
            record("eplb_moved", least_moved(before_theirs, theirs))
            record("eplb_moved_by_slot", int((before_theirs != theirs).sum()))
            record("ours_moved", sum(len(moves(a, b)) for a, b in zip(before, ours, strict=True)))
    means = {name: statistics.mean(values) for name, values in found.items()}
    return {
        "problem": asdict(problem),
        "drift": drift,
        **means,
        "slots": problem.layers * problem.ranks * problem.capacity,
        "moved_ratio": sum(found["ours_moved"]) / sum(found["eplb_moved"]),
        "cpu_s": {name: {"median": statistics.median(t), "max": max(t)} for name, t in times.items()},
    }


def solve(problem: Problem, load_LE: Array, previous: tuple[Placement, ...] | None) -> tuple[Placement, ...]:
    return balance(load_LE, problem.topology, problem.capacity, num_groups=problem.groups, previous=previous)


def load_eplb(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location("eplb", checkout / "eplb.py")
    if spec is None or spec.loader is None or not (checkout / "eplb.py").is_file():
        raise typer.BadParameter(f"no eplb.py in {checkout}", param_hint="--eplb")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="Balancedness at first, after drift; experts moved a step; CPU seconds a solution (median)")
    for column in ("problem", "drift", "naive", "EPLB", "ours", "EPLB after", "ours after", "unmoved"):
        table.add_column(column, justify="right")
    for column in ("EPLB moved", "ours moved", "ratio", "EPLB s", "ours s", "with previous s"):
        table.add_column(column, justify="right")
    for r in results:
        quality = [
            f"{r[name]:.3f}" for name in ("naive", "eplb_start", "ours_start", "eplb", "ours", "ours_if_nothing_moved")
        ]
        moved = [
            f"{r['eplb_moved'] / r['slots']:.1%}",
            f"{r['ours_moved'] / r['slots']:.1%}",
            f"{r['moved_ratio']:.3f}",
        ]
        seconds = [f"{r['cpu_s'][name]['median']:.2f}" for name in ("eplb", "from_nothing", "with_previous")]
        table.add_row(r["problem"]["name"], f"{r['drift']}", *quality, *moved, *seconds)
    Console(width=170).print(table)


def main(
    eplb: Annotated[Path, typer.Option(help="A checkout of deepseek-ai/EPLB.")],
    steps: int = 4,
    seeds: int = 3,
    output: Path = Path(__file__).parent / "results" / "placement.json",
) -> None:
    """Runs both solvers, prints a table, writes JSON."""
    torch.set_num_threads(1)
    module = load_eplb(eplb)
    cases = [(problem, drift) for problem in PROBLEMS for drift in DRIFTS]
    results = [drifting(module, problem, drift, steps, seeds) for problem, drift in cases]
    show(results)
    record = {
        "benchmark": "placement",
        "hardware": hardware_record(),
        "settings": {"sigma": SIGMA, "steps": steps, "seeds": seeds, "tolerance": TOLERANCE},
        "clock": "CPU time of the thread",
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
