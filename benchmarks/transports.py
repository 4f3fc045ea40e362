"""What dispatch and combine cost, by kind of transport, and whether halves of a batch pay.

    python -m benchmarks.transports [--rounds 7] [--calls 20] [--top-k 4] [--tokens 1 --tokens 4 ...] [--ranks 2 ...]

Real processes on this machine, one thread each; rows of width 512 in bf16, 16 experts. They take turns call by call,
and ratios (of shared memory to gather and scatter, of the others to all-to-all) are of one round's medians, so that a
machine with other work distorts them little. "alone" is shared memory call after call: ranks that another transport
let go one after the other do not start together.
"layer" is dispatch, experts of width 256 and combine, at once and in two halves (two-batch overlap).

Legend: T tokens of a rank, D model width, K experts per token, R rows of a rank, N ranks, L slots of a rank.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread as spread_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moestro.kernels.grouped_experts import ExpertShape, GroupedExperts, make_experts
from moestro.router.board import Board, NoBoard
from moestro.router.mesh import Mesh, StoreAddress, join, serve_store
from moestro.router.parallel import GroupShape
from moestro.router.transport import Transport
from moestro.router.transports.all_to_all import AllToAllTransport
from moestro.router.transports.fixed_capacity import FixedCapacityTransport
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.router.transports.shared_memory import SharedMemoryTransport

WIDTH, EXPERT_WIDTH, NUM_EXPERTS = 512, 256, 16


def board_of(mesh: Mesh) -> Board:
    if isinstance(mesh.board, NoBoard):
        raise RuntimeError(f"no shared memory to measure: {mesh.board.reason}")
    return mesh.board


KINDS: dict[str, Callable[[Mesh, int], Transport[Any]]] = {
    "shared_memory": lambda mesh, capacity: SharedMemoryTransport(board_of(mesh), capacity),
    "all_to_all": lambda mesh, capacity: AllToAllTransport(mesh.world, capacity),
    "gather_scatter": lambda mesh, capacity: GatherScatterTransport(mesh.world, capacity),
    "fixed_capacity": lambda mesh, capacity: FixedCapacityTransport(mesh.world, capacity),
}
Figures = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Settings:
    tokens: tuple[int, ...]  # of a rank
    top_k: int
    rounds: int
    calls: int  # of each variant in a round


def halves(num_tokens: int, num_parts: int) -> list[slice]:
    bounds = [part * num_tokens // num_parts for part in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def layer(
    transport: Transport[Any], experts: GroupedExperts | None, x_TD: Tensor, slots_TK: Tensor, w_TK: Tensor, parts: int
) -> None:
    """Dispatch, experts (or none) and combine of ``parts`` parts; every rank has the same number of tokens."""
    shards = halves(x_TD.shape[0], parts)
    size = NUM_EXPERTS // transport.capacity  # type: ignore[attr-defined]
    arriving = [transport.dispatch(x_TD[s], slots_TK[s], (s.stop - s.start,) * size) for s in shards]
    returning = []
    for shard, arrival in zip(shards, arriving, strict=True):
        dispatched, handle = arrival()
        y_RD = experts.apply(dispatched.x_RD, dispatched.counts_L) if experts else dispatched.x_RD
        returning.append(transport.combine(y_RD, w_TK[shard], handle))
    for returned in returning:
        returned()


def microseconds(variants: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Median of ``calls`` of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(calls):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def measure(mesh: Mesh, settings: Settings) -> Figures:
    """By number of tokens: the figures of this rank."""
    generator = torch.Generator().manual_seed(mesh.rank)
    capacity = NUM_EXPERTS // mesh.shape.world_size
    transports = {name: make(mesh, capacity) for name, make in KINDS.items()}

    def fill(*weights: Tensor) -> None:
        for weight in weights:
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))

    shape = ExpertShape(EXPERT_WIDTH, WIDTH, torch.bfloat16, mesh.device)
    experts = make_experts(shape, [fill] * capacity)
    results: Figures = {}
    for num_tokens in settings.tokens:
        x_TD = torch.randn(num_tokens, WIDTH, generator=generator).bfloat16()
        slots_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(settings.top_k, 1).indices
        w_TK = torch.rand(num_tokens, settings.top_k, generator=generator)
        variants: dict[str, Callable[[], object]] = {
            name: partial(layer, transport, None, x_TD, slots_TK, w_TK, 1) for name, transport in transports.items()
        }
        for parts in (1, 2):
            variants[f"layer_in_{parts}"] = partial(
                layer, transports["gather_scatter"], experts, x_TD, slots_TK, w_TK, parts
            )
        rows = []
        for number in range(-1, settings.rounds):  # round -1 warms up and is not counted
            row = microseconds(variants, settings.calls)
            row |= microseconds({"alone": variants["shared_memory"]}, 20 * settings.calls)
            row["shared_memory_ratio"] = row["shared_memory"] / row["gather_scatter"]
            row["gather_scatter_ratio"] = row["gather_scatter"] / row["all_to_all"]
            row["fixed_capacity_ratio"] = row["fixed_capacity"] / row["all_to_all"]
            row["halves_ratio"] = row["layer_in_2"] / row["layer_in_1"]
            rows += [row] if number >= 0 else []
        results[str(num_tokens)] = spread_of(rows)
    return results


def run_rank(rank: int, size: int, address: StoreAddress, settings: Settings, results: Any) -> None:
    torch.set_num_threads(1)
    with join(GroupShape(size), rank, address.connect(60)) as mesh:
        figures = measure(mesh, settings)
        if rank == 0:
            results.put(figures)
        mesh.control.all_gather(torch.zeros(1))  # nobody leaves before all are done


def over(size: int, settings: Settings) -> Figures:
    """Rank 0's figures in a group of ``size``."""
    context = multiprocessing.get_context("spawn")
    store, address = serve_store()
    results = context.Queue()
    ranks = [context.Process(target=run_rank, args=(r, size, address, settings, results)) for r in range(size)]
    for rank in ranks:
        rank.start()
    figures: Figures = results.get(timeout=600)
    for rank in ranks:
        rank.join()
    del store
    return figures


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    calls: Annotated[int, typer.Option(min=1)] = 20,
    top_k: Annotated[int, typer.Option(min=1, max=NUM_EXPERTS)] = 4,
    tokens: Annotated[list[int], typer.Option(help="Of each rank; may be repeated.")] = [1, 4, 16, 64, 256, 1024],  # noqa: B006
    ranks: Annotated[list[int], typer.Option(help="May be repeated.")] = [2, 4],  # noqa: B006
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/transports.json"),
) -> None:
    """Measures, prints a table, writes JSON."""
    settings = Settings(tuple(tokens), top_k, rounds, calls)
    results = {str(size): over(size, settings) for size in ranks}
    table = Table(title=f"dispatch + combine, top-{top_k}, microseconds: median of {rounds} rounds (range)")
    columns = (
        *KINDS,
        "shared_memory_ratio",
        "gather_scatter_ratio",
        "fixed_capacity_ratio",
        "layer_in_1",
        "halves_ratio",
    )
    for column in ("ranks", "tokens", *columns):
        table.add_column(column, justify="right")
    for size, by_tokens in results.items():
        for num_tokens, figures in by_tokens.items():
            cells = []
            for column in columns:
                digits = 2 if column.endswith("ratio") else 0
                one = {key: f"{value:.{digits}f}" for key, value in figures[column].items()}
                cells.append(f"{one['median']} ({one['min']} to {one['max']})")
            table.add_row(size, num_tokens, *cells)
    Console(width=170).print(table)
    fixed = {"width": WIDTH, "expert_width": EXPERT_WIDTH, "num_experts": NUM_EXPERTS, "dtype": "bfloat16"}
    record = {
        "benchmark": "transports",
        "hardware": hardware_record(),
        "settings": fixed | {"backend": "gloo"} | asdict(settings),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
