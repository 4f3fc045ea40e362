"""Which backend computes a model, and why: one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moestro.kernels.backend import Backend
from moestro.kernels.cpu.backend import make_cpu_backend, why_not_cpu
from moestro.kernels.cpu.build import BuildError
from moestro.kernels.plain import PlainBackend

BackendName = Literal["auto", "plain", "cpu", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend and one line that says why."""

    backend: Backend
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, asked_for: BackendName = "auto") -> Chosen:
    """The fastest backend that serves ``dtype`` on ``device``, or the one that was asked for.

    ``cpu`` is built on its first use on a machine, which takes seconds. Raises ``ValueError``, with the reason, where
    the backend asked for cannot serve.
    """
    if asked_for == "plain":
        return Chosen(PlainBackend(), "asked for")
    if asked_for == "cuda":
        raise ValueError("kernels: the backend cuda is not there yet")
    reason = why_not_cpu(device, dtype)
    try:
        if reason is None:
            return Chosen(make_cpu_backend(), "asked for" if asked_for == "cpu" else "bf16 on a CPU with AVX-512 bf16")
    except BuildError as error:
        reason = str(error)
    if asked_for == "cpu":
        raise ValueError(f"kernels: the backend cpu cannot serve: {reason}")
    return Chosen(PlainBackend(), f"not cpu: {reason}")
