"""What placement is worth on 8 to 256 ranks: a simulation, nothing here was run on such a cluster.

    python -m benchmarks.scaling_simulation

One mixture layer of a decode step takes dispatch + experts of the slowest rank + combine, with
- dispatch and combine: what DeepEP publishes for its low-latency kernels (128 tokens a rank, hidden 7168, top-8);
- experts: the larger of reading the weights of the experts a rank has rows for and multiplying its rows. Shapes and
  sizes of DeepSeek-V3 (256 experts, 7168 x 2048, one byte a weight); rates of one H200 as measured: 4.3 TB/s,
  790 TFLOP/s (bf16; fp8 would be faster, so this overstates what imbalance costs where rows decide).

The work a rank brings is constant, 128 tokens. Popularity is lognormal (sigma 1), drifts a little in every window (0.1)
and is replaced by another half way. Rows are drawn from it. A window is served by what the loads of the window before
suggest, so each policy meets the shift unprepared. Every rank has one spare slot. The time to move weights is shown
beside: they travel behind the steps, at an assumed 50 GB/s a rank, and what they do to the steps is not simulated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import typer
from benchmarks.hardware import hardware_record
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moestro.router.balance import TOLERANCE, Topology, balance
from moestro.router.placement import EMPTY, Placement, spread

Array = NDArray[np.float64]

RANKS = (8, 16, 32, 64, 128, 256)
DISPATCH_US = (77, 118, 155, 173, 192, 194)
COMBINE_US = (114, 195, 273, 314, 369, 360)
TOKENS, TOP_K, NUM_EXPERTS, MODEL_LAYERS = 128, 8, 256, 58
EXPERT_WEIGHTS = 3 * 7168 * 2048  # also bytes
BYTES_PER_US, FLOPS_PER_US, LINK_BYTES_PER_US = 4.3e6, 790e6, 50e3
SIGMA, DRIFT, WINDOWS, LAYERS = 1.0, 0.1, 12, 8
SHIFT = WINDOWS // 2
POLICIES = {
    "spread": "experts in order, never moved",
    "from nothing": "a new plan in every window, the previous one ignored",
    "with previous": "a new plan in every window that starts from the previous one",
}


@dataclass(frozen=True, slots=True)
class Result:
    """Times of one mixture layer in microseconds, means over layers and windows."""

    ranks: int
    policy: str
    step_us: float
    shifted_us: float  # in the window of the shift
    even_us: float  # if every rank had the mean of rows and of experts read
    moved_gb: float  # a window after the first, all layers of the model
    moving_ms: float  # for the rank that loads most, a window, all layers of the model


def expert_us(rows_E: Array, placement: Placement) -> Array:
    """By rank. The rows of an expert are shared equally by its replicas."""
    copies_E = np.array([len(slots) for slots in placement.slots_of_expert])
    share_E = np.append(rows_E / copies_E, 0.0)
    slots_RC = np.array(placement.slots)
    rows_R = share_E[slots_RC].sum(axis=1)
    experts_R = ((share_E[slots_RC] > 0) & (slots_RC != EMPTY)).sum(axis=1)
    return np.maximum(experts_R * EXPERT_WEIGHTS / BYTES_PER_US, rows_R * 2 * EXPERT_WEIGHTS / FLOPS_PER_US)


def least_loaded(old: Placement, new: Placement) -> list[int]:
    """By rank: the experts it did not have before, in whatever slots (a plan from nothing does not keep to them)."""
    ranks = zip(old.slots, new.slots, strict=True)
    return [len(set(after) - set(before) - {EMPTY}) for before, after in ranks]


def drawn_rows(ranks: int, seed: int) -> NDArray[np.int64]:
    """rows: windows, layers, experts; the same for every policy."""
    rng = np.random.default_rng((seed, ranks))
    rows = np.empty((WINDOWS, LAYERS, NUM_EXPERTS), dtype=np.int64)
    for window in range(WINDOWS):
        if window in (0, SHIFT):
            load_LE = rng.lognormal(0.0, SIGMA, (LAYERS, NUM_EXPERTS))
        load_LE = load_LE * rng.lognormal(0.0, DRIFT, load_LE.shape)
        rows[window] = rng.multinomial(ranks * TOKENS * TOP_K, load_LE / load_LE.sum(axis=1, keepdims=True))
    return rows


def simulate(ranks: int, policy: str, network_us: float, seed: int) -> Result:
    topology, capacity = Topology.regular(ranks, 8), -(-NUM_EXPERTS // ranks) + 1
    plan = (spread(NUM_EXPERTS, ranks, capacity),) * LAYERS
    steps, even, moved, moving = [], [], [], []
    windows = drawn_rows(ranks, seed)
    for window, rows in enumerate(windows):
        if window and policy != "spread":
            previous = plan if policy == "with previous" else None
            new = balance(windows[window - 1], topology, capacity, previous=previous)
            loaded = [least_loaded(a, b) for a, b in zip(plan, new, strict=True)]
            plan = new
            if window > 1:  # the first plan replaces the spread in both cases
                moved.append(np.sum(loaded))
                moving.append(np.sum(loaded, axis=0).max())
        us_LR = np.stack([expert_us(rows_E, placement) for rows_E, placement in zip(rows, plan, strict=True)])
        steps.append(network_us + us_LR.max(axis=1).mean())
        even.append(network_us + us_LR.mean())
    scale = MODEL_LAYERS / LAYERS * EXPERT_WEIGHTS
    return Result(
        ranks,
        policy,
        float(np.mean(steps)),
        float(steps[SHIFT]),
        float(np.mean(even)),
        float(np.mean(moved or [0])) * scale / 1e9,
        float(np.mean(moving or [0])) * scale / LINK_BYTES_PER_US / 1e3,
    )


def show(results: list[Result]) -> None:
    table = Table(title="Simulated: one mixture layer (µs); weights moved in a window, all layers")
    columns = ("ranks", "policy", "step", "if even", "in the shift's window", "moved GB", "fullest link ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for r in results:
        times = [f"{us:.0f}" for us in (r.step_us, r.even_us, r.shifted_us)]
        table.add_row(str(r.ranks), r.policy, *times, f"{r.moved_gb:.0f}", f"{r.moving_ms:.0f}")
    Console(width=110).print(table)


def plot(results: list[Result], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time, moved = figure.subplots(1, 2)
    for policy, colour in zip(POLICIES, ("C0", "C1", "C2"), strict=True):
        mine = [r for r in results if r.policy == policy]
        time.plot([r.ranks for r in mine], [r.step_us for r in mine], marker="o", color=colour, label=policy)
        if policy != "spread":
            moved.plot([r.ranks for r in mine], [r.moved_gb for r in mine], marker="o", color=colour, label=policy)
    even = [r for r in results if r.policy == "with previous"]
    time.plot([r.ranks for r in even], [r.even_us for r in even], "k:", label="every rank alike")
    network = np.add(DISPATCH_US, COMBINE_US)
    time.plot(RANKS, network, "k--", label="dispatch and combine alone (DeepEP, published)")
    time.set(title="One mixture layer of a decode step", ylabel="µs, mean over windows", ylim=(0, None))
    moved.set(title="Weights moved in a window", ylabel="GB, all layers", ylim=(0, None))
    for axes in (time, moved):
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.set_xlabel("ranks (128 tokens each)")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize="small")
    figure.suptitle("Simulation, not a measurement: 256 experts, top-8, lognormal popularity that shifts half way")
    figure.savefig(path, dpi=120)


def main(seed: int = 0, output: Path = Path(__file__).parent / "results" / "scaling_simulation.json") -> None:
    """Simulates, prints a table, writes JSON and, beside it, a PNG."""
    results = [
        simulate(ranks, policy, dispatch + combine, seed)
        for ranks, dispatch, combine in zip(RANKS, DISPATCH_US, COMBINE_US, strict=True)
        for policy in POLICIES
    ]
    show(results)
    record = {
        "benchmark": "scaling_simulation",
        "hardware": hardware_record(),
        "model": {
            "dispatch_us": dict(zip(RANKS, DISPATCH_US, strict=True)),
            "combine_us": dict(zip(RANKS, COMBINE_US, strict=True)),
            "tokens_per_rank": TOKENS,
            "top_k": TOP_K,
            "num_experts": NUM_EXPERTS,
            "model_layers": MODEL_LAYERS,
            "expert_bytes": EXPERT_WEIGHTS,
            "bytes_per_us": BYTES_PER_US,
            "flops_per_us": FLOPS_PER_US,
            "link_bytes_per_us": LINK_BYTES_PER_US,
        },
        "settings": {
            "sigma": SIGMA,
            "drift": DRIFT,
            "windows": WINDOWS,
            "layers": LAYERS,
            "seed": seed,
            "tolerance": TOLERANCE,
        },
        "policies": POLICIES,
        "results": [asdict(result) for result in results],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    plot(results, output.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
