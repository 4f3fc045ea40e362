"""Finds the fastest tile of every kernel and writes the chip's table: ``python -m benchmarks.tune_tiles``.

Legend: T tokens, K experts per token, D model width, I expert width or input features.

On a CUDA device it times each candidate by replaying a CUDA graph over weights that do not fit the L2 cache, and keeps
the fastest. ``--models`` and ``--parts`` choose what to tune, so that a run stays short; all else keeps its entry.
``--defaults`` needs no device: it writes the default rule for every case, marked as not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.cuda.experts import MOST_COMPARED, CudaExperts, make_cuda_experts
from moestro.kernels.cuda.linear import CudaLinear
from moestro.kernels.cuda.tiles import ROWS, Kernel, Tile, TileTable, default_tile, read_table, tile_count
from moestro.kernels.grouped_experts import ExpertShape

TABLE = Path(__file__).parents[1] / "kernels" / "cuda" / "tiles" / "h200.json"
_BEYOND_L2 = 256 << 20  # bytes
_CALLS = 20  # of one replay
_REPLAYS = 7


@dataclass(frozen=True, slots=True)
class MoeModel:
    """The products of one model's layer and its head, on one device."""

    hidden: int
    width: int  # of an expert
    slots: int
    top_k: int
    qkv: int
    attention: int  # heads times their width
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features."""
        return {
            "qkv": (self.qkv, self.hidden),
            "out": (self.hidden, self.attention),
            "gate": (self.slots, self.hidden),
            "head": (self.vocabulary, self.hidden),
        }


MODELS = {
    "Qwen3-30B-A3B": MoeModel(2048, 768, 128, 8, 5120, 4096, 151936),
    "Mixtral-8x7B": MoeModel(4096, 14336, 8, 2, 6144, 4096, 32000),
    "gpt-oss-20b": MoeModel(2880, 2880, 32, 4, 5120, 4096, 201088),
}

Choice = tuple[int, Tile]  # the most rows, and their tile
Entry = dict[str, Any]
PARTS = ("linear", "experts", "fp8")


def cases(model: MoeModel) -> Iterator[tuple[Kernel, int, int]]:
    """Kernel, output and input features; what one choice in the table is for."""
    for out_features, in_features in model.linears.values():
        yield "linear", out_features, in_features
    for gate_up, down in EXPERT_KERNELS:
        yield gate_up, 2 * model.width, model.hidden
        yield down, model.hidden, model.width


EXPERT_KERNELS: tuple[tuple[Kernel, Kernel], ...] = (("gate_up", "down"), ("gate_up_fp8", "down_fp8"))


def candidates(kernel: Kernel, rows: int) -> list[Tile]:
    """That fit a block's shared memory and registers; tiles of experts keep the default's rows, which gate-up and down
    share."""
    default = default_tile(kernel, 1 << 20, 1 << 12, rows)
    fp8 = kernel.endswith("_fp8")
    num_rows = [default.rows] if kernel != "linear" else sorted({max(16, default.rows // 2), default.rows})
    options = product(((64, 4), (128, 4), (128, 8)), num_rows, (128,) if fp8 else (64, 128), (3, 5))
    tiles = [Tile(out, rows, features, warps, stages) for (out, warps), rows, features, stages in options]
    return [tile for tile in tiles if _fits(tile, 1 if fp8 else 2)]


def _fits(tile: Tile, bytes_of_weight: int) -> bool:
    shared = tile.stages * tile.features * (tile.out * bytes_of_weight + tile.rows * 2)
    accumulators = tile.out * tile.rows / (tile.warps * 32)
    return shared <= 220 << 10 and accumulators <= 128


def entry(key: tuple[Kernel, int, int], choices: list[Choice], measured: bool) -> Entry:
    kernel, out_features, in_features = key
    listed = [{"rows": rows, "tile": asdict(tile)} for rows, tile in choices]
    shape = {"kernel": kernel, "out_features": out_features, "in_features": in_features}
    return {**shape, "measured": measured, "choices": listed}


def default_entries() -> list[Entry]:
    keys = dict.fromkeys(key for model in MODELS.values() for key in cases(model))
    return [entry(key, [(rows, default_tile(*key, rows)) for rows in ROWS], measured=False) for key in keys]


def dump(entries: list[Entry]) -> str:
    """One line for each tile."""
    blocks = []
    for each in entries:
        head = json.dumps({name: value for name, value in each.items() if name != "choices"})[:-1]
        lines = ",\n    ".join(json.dumps(choice) for choice in each["choices"])
        blocks.append(f'  {head}, "choices": [\n    {lines}\n  ]}}')
    return '{"chip": "NVIDIA H200", "entries": [\n' + ",\n".join(blocks) + "\n]}\n"


def merged(table: TileTable, tuned: list[Entry]) -> list[Entry]:
    """The table's entries, of which those in ``tuned`` are replaced."""
    replaced = {(each["kernel"], each["out_features"], each["in_features"]) for each in tuned}
    old = [(key, choices) for key, choices in table.tiles.items() if key not in replaced]
    return [entry(key, list(choices), key in table.measured) for key, choices in old] + tuned


def graph_seconds(calls: list[Callable[[], object]]) -> float:
    """Of one call: the median over replays of a graph that runs through ``calls`` again and again."""
    for call in calls:
        call()  # compiles, and asks the allocator
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(_CALLS):
            calls[i % len(calls)]()
    taken = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return statistics.median(taken)


def fastest(tiles: list[Tile], seconds_of: Callable[[Tile], float]) -> tuple[Tile, float]:
    timed = []
    for tile in tiles:
        try:
            timed.append((seconds_of(tile), tile))
        except Exception as error:  # a candidate that the compiler refuses is not chosen, whatever it says
            print(f"    {tile}: {type(error).__name__}: {error}")
    seconds, tile = min(timed, key=lambda each: each[0])
    return tile, seconds


def linear_seconds(linears: list[CudaLinear], x_TI: Tensor, tile: Tile) -> float:
    return graph_seconds([partial(linear.apply_tiled, x_TI, tile) for linear in linears])


def tune_linear(out_features: int, in_features: int) -> list[Choice]:
    copies = tile_count(_BEYOND_L2, out_features * in_features * 2)
    linears = [CudaLinear(_random(out_features, in_features)) for _ in range(min(copies, _CALLS))]
    choices = []
    for rows in ROWS:
        x_TI = _random(1 if rows == ROWS[0] else rows, in_features)

        tile, seconds = fastest(candidates("linear", rows), partial(linear_seconds, linears, x_TI))
        print(f"  linear {out_features} x {in_features}, {len(x_TI)} rows: {seconds * 1e6:.1f} us, {tile}", flush=True)
        choices.append((rows, tile))
    return choices


def mix_seconds(
    experts: CudaExperts, x_TD: Tensor, slots: list[Tensor], weights_TK: Tensor, down: Tile, gate_up: Tile
) -> float:
    mix = experts.mix_compared if slots[0].numel() <= MOST_COMPARED else experts.mix_sorted
    return graph_seconds([partial(mix, x_TD, slots_TK, weights_TK, (gate_up, down)) for slots_TK in slots])


def tune_experts(model: MoeModel, fp8: bool) -> tuple[list[Choice], list[Choice]]:
    """Gate-up first, with the default for down, then down."""

    def fill(gate_up_2ID: Tensor, down_DI: Tensor) -> None:
        gate_up_2ID.normal_(std=gate_up_2ID.shape[1] ** -0.5)
        down_DI.normal_(std=down_DI.shape[1] ** -0.5)

    shape = ExpertShape(model.width, model.hidden, torch.bfloat16, torch.device("cuda"))
    experts = make_cuda_experts(shape, [fill] * model.slots, fp8=fp8)
    gate_up_kernel, down_kernel = EXPERT_KERNELS[fp8]
    gate_ups, downs = [], []
    for rows in ROWS:
        num_tokens = 1 if rows == ROWS[0] else rows * model.slots // model.top_k // 2
        x_TD = _random(num_tokens, model.hidden)
        # One token reads the same few experts at each call, unless it is another token.
        slots = [
            torch.rand(num_tokens, model.slots, device="cuda").topk(model.top_k).indices
            for _ in range(_CALLS if num_tokens == 1 else 1)
        ]
        weights_TK = torch.full((num_tokens, model.top_k), 1 / model.top_k, device="cuda")

        seconds_of = partial(mix_seconds, experts, x_TD, slots, weights_TK)
        default = default_tile(down_kernel, model.hidden, model.width, rows)
        gate_up, _ = fastest(candidates(gate_up_kernel, rows), partial(seconds_of, default))
        down, seconds = fastest(candidates(down_kernel, rows), partial(seconds_of, gate_up=gate_up))
        print(f"  experts, fp8 {fp8}, {num_tokens} tokens: {seconds * 1e6:.1f} us, {gate_up}, {down}", flush=True)
        gate_ups.append((rows, gate_up))
        downs.append((rows, down))
    return gate_ups, downs


def tune(model: MoeModel, parts: Collection[str]) -> list[Entry]:
    entries = []
    if "linear" in parts:
        for shape in model.linears.values():
            entries.append(entry(("linear", *shape), tune_linear(*shape), measured=True))
    for fp8, (gate_up, down) in enumerate(EXPERT_KERNELS):
        if PARTS[1 + fp8] in parts:
            gate_ups, downs = tune_experts(model, bool(fp8))
            entries.append(entry((gate_up, 2 * model.width, model.hidden), gate_ups, measured=True))
            entries.append(entry((down, model.hidden, model.width), downs, measured=True))
            torch.cuda.empty_cache()
    return entries


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Finds the fastest tile of every kernel.")
    parser.add_argument("--defaults", action="store_true", help="write the default rule; needs no device")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    if args.defaults:
        args.out.write_text(dump(default_entries()), encoding="utf-8")
        return
    for name in args.models:
        print(name, flush=True)
        tuned = tune(MODELS[name], args.parts)
        args.out.write_text(dump(merged(read_table(args.out), tuned)), encoding="utf-8")


if __name__ == "__main__":
    main()
