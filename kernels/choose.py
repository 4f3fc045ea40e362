"""Which backend computes a model, and why: one pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moestro.kernels.backend import Backend, BackendName
from moestro.kernels.cpu.backend import make_cpu_backend, why_not_cpu
from moestro.kernels.cuda.available import why_not_cuda
from moestro.kernels.native_module import BuildError
from moestro.kernels.plain import PlainBackend


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend and one line that says why."""

    backend: Backend
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, asked_for: BackendName = "auto") -> Chosen:
    """The fastest backend that serves ``dtype`` on ``device``, or the one that was asked for.

    ``cpu`` is built on its first use on a machine, which takes the better part of a minute. Raises ``ValueError``, with
    the reason, where the backend asked for cannot serve.
    """
    if asked_for == "plain":
        return Chosen(PlainBackend(), "asked for")
    name = asked_for if asked_for != "auto" else "cuda" if device.type == "cuda" else "cpu"
    made = _MAKERS[name](device, dtype)
    if not isinstance(made, str):
        return Chosen(made, f"for {str(dtype).removeprefix('torch.')} on {device.type}")
    if asked_for != "auto":
        raise ValueError(f"kernels: the backend {name} cannot serve: {made}")
    return Chosen(PlainBackend(), f"not {name}: {made}")


def _cpu(device: torch.device, dtype: torch.dtype) -> Backend | str:
    """The backend, or why not."""
    try:
        return why_not_cpu(device, dtype) or make_cpu_backend()
    except BuildError as error:
        return str(error)


def _cuda(device: torch.device, dtype: torch.dtype) -> Backend | str:
    """The backend, or why not."""
    reason = why_not_cuda(device, dtype)
    if reason is not None:
        return reason
    from moestro.kernels.cuda.backend import CudaBackend  # Triton is imported only where it is used

    return CudaBackend()


_MAKERS = {"cpu": _cpu, "cuda": _cuda}
