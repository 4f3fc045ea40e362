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
    """``module`` has a function ``entry``; past ``limit_s`` its process is ended and what it said so far is kept."""

    module: str
    limit_s: float
    about: str
    entry: str = "run"

    def load(self) -> Run:
        run: Run = getattr(import_module(self.module), self.entry)
        return run


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "environment": Part("benchmarks.gpu_suite.environment", 60, "device and versions"),
        "roofs": Part("benchmarks.gpu_suite.roofs", 60, "copy bandwidth and bf16 matmul"),
        "sampling": Part("benchmarks.gpu_suite.sampling", 90, "noise and tokens equal to the CPU's"),
        "collectives": Part("benchmarks.gpu_suite.collectives", 90, "one rank over NCCL"),
        "invariance": Part("benchmarks.gpu_suite.invariance", 90, "the same bits alone and in company"),
        "correctness": Part("benchmarks.gpu_suite.parity", 150, "every architecture against transformers"),
        "kernels": Part("benchmarks.gpu_suite.kernels", 120, "every kernel against fp64, and the same bits"),
        "layers": Part("benchmarks.gpu_suite.layers", 90, "MoE layer and attention alone, against peers"),
        "speed_gpt_oss": Part("benchmarks.gpu_suite.speed", 90, "decode of gpt-oss-20b's shape", "run_gpt_oss"),
        "speed_mixtral": Part("benchmarks.gpu_suite.speed", 100, "decode of Mixtral-8x7B", "run_mixtral"),
        "speed": Part("benchmarks.gpu_suite.speed", 240, "decode, prefill and a mixed load of Qwen3-30B-A3B"),
    }
)
