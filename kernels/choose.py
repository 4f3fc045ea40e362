"""Which backend computes a model, and why: one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moestro.kernels.backend import Backend
from moestro.kernels.cuda.available import why_not_cuda
from moestro.kernels.plain import PlainBackend

BackendName = Literal["auto", "plain", "cpu", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend and one line that says why."""

    backend: Backend
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, asked_for: BackendName = "auto") -> Chosen:
    """The fastest backend that serves ``dtype`` on ``device``, or the one that was asked for. Raises ``ValueError``,
    with the reason, where that cannot serve."""
    if asked_for == "plain":
        return Chosen(PlainBackend(), "asked for")
    if asked_for == "cuda" or (asked_for == "auto" and device.type == "cuda"):
        reason = why_not_cuda(device, dtype)
        if reason is None:
            from moestro.kernels.cuda.backend import CudaBackend  # Triton is imported only where it is used

            return Chosen(CudaBackend(), "asked for" if asked_for == "cuda" else "bf16 on a CUDA device")
        if asked_for == "cuda":
            raise ValueError(f"kernels: the backend cuda cannot serve: {reason}")
        return Chosen(PlainBackend(), f"not cuda: {reason}")
    return Chosen(PlainBackend(), "the only one")
