"""The engines that are compared, how each is started, and with what variables of the process it is at its best."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environments import python_of

ROOT = Path(__file__).resolve().parents[2]
OURS = "ours"
REFERENCE = "transformers"  # whose tokens the others' are compared with
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine under test. ``environment`` is None for the repository's own; ``continuous``: new requests join those
    that run; ``how`` is one line on its settings."""

    location: str  # module:class
    how: str
    environment: str | None = None
    continuous: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)


ROSTER: Mapping[str, Contestant] = {
    OURS: Contestant("benchmarks.peers.engines.ours:Ours", "moestro, one rank, invariant"),
    REFERENCE: Contestant(
        "benchmarks.peers.engines.transformers_generate:TransformersGenerate",
        "generate, grouped_mm experts; under load one request at a time",
        continuous=False,
    ),
    "vllm": Contestant(
        "benchmarks.peers.engines.vllm_cpu:VllmCpu",
        "LLMEngine in process, compiled, no prefix cache",
        environment="vllm",
        variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    ),
    "llama.cpp": Contestant(
        "benchmarks.peers.engines.llama_cpp_batched:LlamaCppBatched",
        "bf16 GGUF, low-level batches, our own loop around llama_decode",
        environment="llama",
    ),
}


def command(contestant: Contestant, environments: Path) -> list[str]:
    python = python_of(environments / contestant.environment) if contestant.environment else Path(sys.executable)
    return [str(python), "-m", "benchmarks.peers.worker", contestant.location]


def variables(contestant: Contestant, cores: tuple[int, ...]) -> dict[str, str]:
    """The whole environment of the worker's process. OpenMP keeps its own waiting policy: each engine has the cores to
    itself while it works."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = [str(ROOT)] if contestant.environment else [str(ROOT / "src"), str(ROOT)]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if contestant.environment == "vllm" else {}
    return kept | {"PYTHONPATH": os.pathsep.join(path)} | bound | dict(contestant.variables)
