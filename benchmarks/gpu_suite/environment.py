"""What the suite runs on: the device that was asked for, and the versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "typer", "rich")


def run(settings: Settings) -> Iterator[Check]:
    yield attempt("device", lambda: _device(settings))
    yield attempt("versions", _versions)


def _device(settings: Settings) -> Values:
    if settings.device == "cpu":
        return {"headline": "cpu; figures mean nothing for a GPU", "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        raise Unmet("cuda was asked for, but torch sees no CUDA device", torch_cuda=torch.version.cuda)
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    ones = torch.ones(1024, device="cuda")
    if float(ones.sum()) != 1024.0:
        raise Unmet("the device does not add")
    return {
        "headline": properties.name,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total_bytes,
        "free_bytes": free_bytes,
        "devices": torch.cuda.device_count(),
    }


def _versions() -> Values:
    versions: Values = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["cuda"] = torch.version.cuda or "none"
    versions["cudnn"] = str(torch.backends.cudnn.version() or "none")
    return {"headline": f"torch {torch.__version__}, Python {versions['python']}"} | versions
