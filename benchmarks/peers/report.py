"""The tables of a record, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]


def show(record: Record, console: Console) -> None:
    for name, model in record["models"].items():
        console.print(throughput_table(name, model))
        console.print(bytes_table(name, model))
        if model["loads"]:
            console.print(load_table(name, model))
        console.print(engine_table(name, model))


def throughput_table(name: str, model: Record) -> Table:
    machine, engines = model["machine"], model["engines"]
    title = (
        f"{name}: tokens/s, share of the roof in brackets "
        f"(memory {machine['bytes_per_s'] / 1e9:.1f} GB/s, bf16 {machine['flop_per_s'] / 1e9:.0f} GFLOP/s)"
    )
    table = Table(
        "batch", "figure", "roof", *engines, "ours / best peer", "goal", "ours / transformers", "goal", title=title
    )
    for cell in model["cells"]:
        table.add_row(
            str(cell["batch"]),
            cell["figure"],
            f"{cell['roof_tokens_per_s']:.0f}",
            *(_figure(cell["engines"].get(each)) for each in engines),
            _ratio(cell.get("over_best"), cell.get("best_peer")),
            _goal(cell.get("over_best")),
            _ratio(cell.get("over_reference")),
            _goal(cell.get("over_reference")),
        )
    return table


def bytes_table(name: str, model: Record) -> Table:
    table = Table("batch", "experts", "dense", "cache", "floor ms", title=f"{name}: MB read by a decode step")
    for cell in model["cells"]:
        if parts := cell.get("step_bytes"):
            floor_ms = 1e3 * cell["batch"] / cell["roof_tokens_per_s"]
            table.add_row(str(cell["batch"]), *(f"{each / 1e6:.1f}" for each in parts.values()), f"{floor_ms:.2f}")
    return table


def load_table(name: str, model: Record) -> Table:
    engines = model["engines"]
    title = f"{name}: time to first token under Poisson arrivals, p50 / p99 ms (requests)"
    table = Table("requests/s", *engines, "best peer / ours p50", "goal", "p99", "goal", title=title)
    for cell in model["loads"]:
        comparisons = (cell.get(f"over_best_ttft_{quantile}_s") for quantile in ("p50", "p99"))
        table.add_row(
            f"{cell['rate']:.2f}",
            *(_latency(cell["engines"].get(each)) for each in engines),
            *(text for each in comparisons for text in (f"{each['ratio']:.2f}" if each else "-", _goal(each))),
        )
    return table


def engine_table(name: str, model: Record) -> Table:
    """Memory, agreement with transformers, settings, and whoever is missing, with the reason."""
    title = f"{name}: memory, agreement with transformers"
    table = Table(
        "engine", "resident MB", "peak MB", "first tokens equal", "prefix equal", "settings or failure", title=title
    )
    for engine, how in model["engines"].items():
        memory, tokens = model["memory"].get(engine), model["agreement"].get(engine, {})
        table.add_row(
            engine,
            *(f"{memory[key] / 1e6:.0f}" if memory else "-" for key in ("resident", "peak")),
            *(f"{tokens[key]:.2f}" if key in tokens else "-" for key in ("first_tokens_equal", "prefix_equal")),
            f"FAILED: {model['failures'][engine]}" if engine in model["failures"] else how,
        )
    return table


def _figure(spread: Mapping[str, float] | None) -> str:
    return "failed" if spread is None else f"{spread['median']:.0f} ({spread['roof_share']:.0%})"


def _latency(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return "not asked"
    return f"{1e3 * figures['ttft_p50_s']:.0f} / {1e3 * figures['ttft_p99_s']:.0f} ({figures['requests']})"


def _ratio(figures: Mapping[str, float] | None, peer: str | None = None) -> str:
    if not figures:
        return "-"
    name = f" {peer}" if peer else ""
    return f"{figures['median']:.2f} ({figures['min']:.2f} to {figures['max']:.2f}){name}"


def _goal(figures: Mapping[str, Any] | None) -> str:
    if not figures or "goal" not in figures:
        return ""
    return f"{figures['goal']:g} {'met' if figures['met'] else 'missed'}"
