"""The parts in the order in which they run. Imports torch only when a part is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from benchmarks.gpu_suite.checks import Check, Settings

Run = Callable[[Settings], Iterator[Check]]


@dataclass(frozen=True, slots=True)
class Part:
    """``module`` has a ``run``; past ``limit_s`` its process is ended and what it said so far is kept."""

    module: str
    limit_s: float
    about: str

    def load(self) -> Run:
        run: Run = import_module(self.module).run
        return run


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "environment": Part("benchmarks.gpu_suite.environment", 60, "device and versions"),
        "roofs": Part("benchmarks.gpu_suite.roofs", 60, "copy bandwidth and bf16 matmul"),
        "sampling": Part("benchmarks.gpu_suite.sampling", 90, "noise and tokens equal to the CPU's"),
        "collectives": Part("benchmarks.gpu_suite.collectives", 90, "one rank over NCCL"),
        "invariance": Part("benchmarks.gpu_suite.invariance", 90, "the same bits alone and in company"),
        "correctness": Part("benchmarks.gpu_suite.parity", 150, "every architecture against transformers"),
        "speed": Part("benchmarks.gpu_suite.speed", 400, "decode and prefill of a 30B-A3B model"),
    }
)
