"""The machine's own limits with so many threads, best of several: nobody can read or multiply faster than this."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.peers.costs import Machine

READ_BYTES = 1 << 29  # many times any cache
MATMUL = 2048
REPEATS = 8


def measure_machine(threads: int) -> Machine:
    """Takes about two seconds."""
    torch.set_num_threads(threads)
    numbers = torch.ones(READ_BYTES // 4)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATMUL, MATMUL, generator=generator).to(torch.bfloat16) for _ in range(2))
    return Machine(
        bytes_per_s=READ_BYTES / fastest(numbers.sum), flop_per_s=2 * MATMUL**3 / fastest(lambda: left @ right)
    )


def best_of(*measured: Machine) -> Machine:
    return Machine(max(each.bytes_per_s for each in measured), max(each.flop_per_s for each in measured))


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
