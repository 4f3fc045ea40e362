"""From rows of single turns to figures of cells: medians, ratios round by round, shares of the roof, goals. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from benchmarks.peers.costs import Machine, decode_bytes, decode_roof, prefill_roof
from benchmarks.peers.roster import OURS, REFERENCE
from benchmarks.rounds import spread

from moestro.workers.model_config import ModelConfig

Row = Mapping[str, Any]

GOAL_BEST, GOAL_REFERENCE = 1.0, 3.0  # ours over the best peer in every cell, and over transformers in decode
FIGURES = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
EXTRAS = ("others_cores", "first_tokens_equal", "prefix_equal")


def batch_cells(rows: Sequence[Row], config: ModelConfig, machine: Machine) -> list[dict[str, Any]]:
    """One cell a batch size and figure: each engine's spread and share of the roof, and how ours compares."""
    cells = []
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        prompt, output = (statistics.mean(row[key] for row in here) for key in ("prompt_tokens", "output_tokens"))
        context = prompt + output / 2
        roofs = {
            "decode": decode_roof(config, batch, context, machine),
            "prefill": prefill_roof(config, batch, round(prompt), machine),
        }
        parts = decode_bytes(config, batch, context)
        for figure, key in FIGURES.items():
            cell = {
                "batch": batch,
                "figure": figure,
                "roof_tokens_per_s": roofs[figure],
                "engines": engine_spreads(here, key, roofs[figure]),
                **comparisons(here, key, figure),
            }
            if figure == "decode":
                cell["step_bytes"] = {"experts": parts.experts, "dense": parts.dense, "cache": parts.cache}
            cells.append(cell)
    return cells


def engine_spreads(rows: Sequence[Row], key: str, roof: float) -> dict[str, dict[str, Any]]:
    """Tokens per second of each engine over the rounds, with what to doubt them by."""
    result = {}
    for engine, own in by_engine(rows).items():
        extras = {name: statistics.median(row[name] for row in own) for name in EXTRAS if all(name in r for r in own)}
        figures = spread([{key: row[key]} for row in own])[key]
        result[engine] = figures | {"roof_share": figures["median"] / roof} | extras
    return result


def comparisons(rows: Sequence[Row], key: str, figure: str) -> dict[str, Any]:
    """Ours over the best peer, and over transformers, as spreads of ratios of the same round, with their goals."""
    engines = by_engine(rows)
    medians = {name: statistics.median(row[key] for row in own) for name, own in engines.items() if name != OURS}
    if OURS not in engines or not medians:
        return {}
    best = max(medians, key=lambda name: medians[name])
    result: dict[str, Any] = {"best_peer": best, "over_best": goal(ratios(engines, best, key), GOAL_BEST)}
    if REFERENCE in engines:
        wanted = GOAL_REFERENCE if figure == "decode" else None
        result["over_reference"] = goal(ratios(engines, REFERENCE, key), wanted)
    return result


def ratios(engines: Mapping[str, Sequence[Row]], peer: str, key: str) -> list[float]:
    """Ours over the peer's in each round that both have."""
    theirs = {row["round"]: row[key] for row in engines[peer]}
    return [row[key] / theirs[row["round"]] for row in engines[OURS] if row["round"] in theirs]


def goal(values: Sequence[float], wanted: float | None) -> dict[str, Any]:
    if not values:
        return {}
    figures: dict[str, Any] = spread([{"ratio": value} for value in values])["ratio"]
    return figures if wanted is None else figures | {"goal": wanted, "met": figures["median"] >= wanted}


def load_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One cell a rate: time to first token of each engine, over the requests of all rounds together, in seconds."""
    cells = []
    for rate in sorted({row["rate"] for row in rows}):
        engines = {}
        for engine, own in by_engine(row for row in rows if row["rate"] == rate).items():
            ttft = [value for row in own for value in row["ttft_s"]]
            whole = [value for row in own for value in row["end_to_end_s"]]
            engines[engine] = {
                "requests": len(ttft),
                "ttft_p50_s": float(np.quantile(ttft, 0.5)),
                "ttft_p99_s": float(np.quantile(ttft, 0.99)),
                "end_to_end_p50_s": float(np.quantile(whole, 0.5)),
                "others_cores": statistics.median(row["others_cores"] for row in own),
            }
        cells.append({"rate": rate, "engines": engines, **load_comparison(engines)})
    return cells


def load_comparison(engines: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The best peer's time to first token over ours, so that above 1 is better here too."""
    peers = [name for name in engines if name != OURS]
    if OURS not in engines or not peers:
        return {}
    result = {}
    for key in ("ttft_p50_s", "ttft_p99_s"):
        best = min(peers, key=lambda name: engines[name][key])
        ratio = engines[best][key] / engines[OURS][key]
        result[f"over_best_{key}"] = {"best_peer": best, "ratio": ratio, "goal": GOAL_BEST, "met": ratio >= GOAL_BEST}
    return result


def by_engine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row["engine"], []).append(row)
    return result
