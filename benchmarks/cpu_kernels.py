"""The C++ kernels of the ``cpu`` backend against those of ``plain``, one by one, and against what the machine can do.

    python -m benchmarks.cpu_kernels [--threads 1] [--rounds 7] [--only linear] [--output file.json]

Weights are read from memory: calls go round copies that no cache holds. Both kinds take turns, round by round; a figure
is the median of a round's calls, then the median and range over rounds, and ratios are of one round. The roofs are
measured in the same rounds: bandwidth of reading 256 MiB of large pages, and vdpbf16ps in registers. With one thread
time is the thread's CPU time, which work beside it hardly touches; with more it is wall time.

Legend: T rows or tokens, D model width or half a head, I expert width, L slots or positions, K experts per
token, N heads, S sequences, B columns of a block table.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moestro.kernels.backend import AttentionShape, Backend, HeadNorm, Spans
from moestro.kernels.cpu.backend import make_cpu_backend
from moestro.kernels.cpu.build import load
from moestro.kernels.grouped_experts import ExpertShape
from moestro.kernels.plain import PlainBackend
from moestro.kernels.rotary import rotary_tables

WORKING_SET = 160 << 20  # bytes of copies
ROUND_SECONDS = 0.15  # of calls of one kind
CPU = torch.device("cpu")
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size. ``calls`` yields calls without end, each of which finds its weights in memory."""

    name: str
    num_bytes: float  # that a call must read
    num_flops: float
    calls: Callable[[Backend], Iterator[Call]]


def linear(num_rows: int, out_features: int, in_features: int) -> Case:
    weight_bytes = 2 * out_features * in_features

    def calls(backend: Backend) -> Iterator[Call]:
        weight_OI = torch.randn(out_features, in_features).mul(in_features**-0.5).bfloat16()
        copies = [backend.make_linear(weight_OI) for _ in range(WORKING_SET // weight_bytes)]
        x_TI = torch.randn(num_rows, in_features).bfloat16()
        return (partial(copy.apply, x_TI) for copy in cycle(copies))

    name = f"linear {out_features} x {in_features}, {num_rows} rows"
    return Case(name, weight_bytes, 2 * num_rows * out_features * in_features, calls)


def mixture(num_tokens: int, model_width: int, width: int, num_slots: int, k: int) -> Case:
    shape = ExpertShape(width, model_width, torch.bfloat16, CPU)
    generator = torch.Generator().manual_seed(num_tokens)
    slots_TK = torch.rand(num_tokens, num_slots, generator=generator).topk(k, 1).indices

    def fill(gate_up_2ID: Tensor, down_DI: Tensor) -> None:
        gate_up_2ID.copy_(torch.randn(gate_up_2ID.shape) * model_width**-0.5)
        down_DI.copy_(torch.randn(down_DI.shape) * width**-0.5)

    def calls(backend: Backend) -> Iterator[Call]:
        layers = max(2, WORKING_SET // (num_slots * shape.num_bytes))
        copies = [backend.make_experts(shape, [fill] * num_slots) for _ in range(layers)]
        x_TD, weights_TK = torch.randn(num_tokens, model_width).bfloat16(), torch.rand(num_tokens, k)
        return (partial(copy.mix, x_TD, slots_TK, weights_TK) for copy in cycle(copies))

    name = f"experts {k} of {num_slots}, {model_width} / {width}, {num_tokens} tokens"
    used = len(slots_TK.unique())
    return Case(name, used * shape.num_bytes, num_tokens * k * 6 * model_width * width, calls)


def attention(num_sequences: int, context: int, new_tokens: int, width: int = 64) -> Case:
    """8 query and 2 key/value heads; norm, rotation and writing included. ``new_tokens`` is 1 or all of the context."""
    heads, kv_heads, block_size = 8, 2, 16
    shape = AttentionShape(heads, kv_heads, width, width, width**-0.5, None, torch.bfloat16, CPU)
    columns, positions_L = -(-context // block_size), torch.arange(context - new_tokens, context)
    table_SB = torch.arange(1, num_sequences * columns + 1, dtype=torch.int32).view(num_sequences, columns)
    slot_SL = table_SB.long()[:, positions_L // block_size] * block_size + positions_L % block_size
    starts = [s * new_tokens for s in range(num_sequences + 1)]
    num_decodes = num_sequences if new_tokens == 1 else 0
    spans = Spans(starts, [context] * num_sequences, num_decodes, table_SB, slot_SL.view(-1), block_size)
    cos_T1D, sin_T1D = rotary_tables(
        positions_L.repeat(num_sequences).float().view(-1, 1) * torch.rand(width // 2), 1.0
    )

    def calls(backend: Backend) -> Iterator[Call]:
        kernel = backend.make_attention(shape, HeadNorm(torch.ones(heads + kv_heads, width), 1e-6))
        cache_size = (num_sequences * columns + 1, 2 * kv_heads, block_size, width)
        num_bytes = 2 * math.prod(cache_size)
        caches = [torch.randn(cache_size).bfloat16() for _ in range(min(64, max(2, WORKING_SET // num_bytes)))]
        qkv_TND = torch.randn(num_sequences * new_tokens, heads + 2 * kv_heads, width).bfloat16()
        plan = kernel.plan(spans)
        return (partial(kernel.apply, qkv_TND, cos_T1D, sin_T1D, cache, plan) for cache in cycle(caches))

    kind = "decodes at" if new_tokens == 1 else "prompts of"
    pairs = num_sequences * new_tokens * (2 * context - new_tokens + 1) / 2
    num_bytes = 4 * num_sequences * context * kv_heads * width
    return Case(f"attention {width}, {num_sequences} {kind} {context}", num_bytes, 4 * pairs * heads * width, calls)


CASES = [
    *(linear(rows, *shape) for shape in ((512, 512), (1024, 1024)) for rows in (1, 2, 4, 8, 16, 64, 256, 2048)),
    *(mixture(tokens, 512, 512, 16, 4) for tokens in (1, 4, 16, 64, 256, 2048)),  # a layer of `tiny`
    *(mixture(tokens, 1024, 512, 32, 4) for tokens in (1, 4, 16, 64, 256, 2048)),  # a layer of `mid`
    *(attention(sequences, context, 1) for context in (192, 2048) for sequences in (1, 16, 64)),
    attention(1, 16384, 1),
    *(
        attention(sequences, length, length, width)
        for sequences, length in ((16, 128), (1, 4096))
        for width in (64, 128)
    ),
]


def microseconds(calls: Iterator[Call], clock: Callable[[], float]) -> float:
    """Median of the calls of one round."""
    times = []
    end = time.perf_counter() + ROUND_SECONDS
    while time.perf_counter() < end or len(times) < 3:
        call = next(calls)
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times) * 1e6


def roofs(data: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """The best of a few."""
    kernels, turns = load(), 200_000

    def seconds(call: Call) -> float:
        begin = clock()
        call()
        return clock() - begin

    read = min(seconds(partial(kernels.read_bandwidth, data)) for _ in range(3))
    multiplied = min(seconds(partial(kernels.multiply_in_registers, turns)) for _ in range(3))
    flops = 1536 * turns * torch.get_num_threads()
    return {"GB/s": data.nbytes / read / 1e9, "GFLOP/s": flops / multiplied / 1e9}


def measure(case: Case, rounds: int, data: Tensor) -> dict[str, dict[str, float]]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    ours, plain = case.calls(make_cpu_backend()), case.calls(PlainBackend())
    rows = []
    for number in range(-1, rounds):  # round -1 warms up and is not counted
        roof = roofs(data, clock)
        row = {"us": microseconds(ours, clock), "plain_us": microseconds(plain, clock)}
        row["speedup"] = row["plain_us"] / row["us"]
        row["GB/s"], row["GFLOP/s"] = case.num_bytes / row["us"] / 1e3, case.num_flops / row["us"] / 1e3
        row["share_of_bandwidth"] = row["GB/s"] / roof["GB/s"]
        row["share_of_peak"] = row["GFLOP/s"] / roof["GFLOP/s"]
        rows += [row] if number >= 0 else []
    return spread(rows)


def main(
    threads: Annotated[int, typer.Option(help="Of torch and of the kernels.")] = 1,
    rounds: Annotated[int, typer.Option(help="How many.")] = 7,
    only: Annotated[str, typer.Option(help="Cases whose name contains this.")] = "",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/cpu_kernels.json"),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = load().allocate_experts(1, 1 << 14, 1 << 13).view(-1)[: 1 << 27].fill_(1)
    table = Table("case", "us", "plain us", "speedup", "GB/s", "of roof", "GFLOP/s", "of peak")
    results = {}
    for case in CASES:
        if only not in case.name:
            continue
        results[case.name] = figures = measure(case, rounds, data)
        formats = {"us": ".1f", "plain_us": ".1f", "speedup": ".2f", "GB/s": ".1f", "share_of_bandwidth": ".0%"}
        formats |= {"GFLOP/s": ".0f", "share_of_peak": ".0%"}
        table.add_row(case.name, *(format(figures[key]["median"], each) for key, each in formats.items()))
    Console(width=120).print(table)
    record = {"hardware": hardware_record(), "threads": threads, "rounds": rounds, "cases": results}
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
