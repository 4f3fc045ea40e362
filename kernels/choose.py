"""Which backend computes a model, and why: one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moestro.kernels.backend import Backend
from moestro.kernels.plain import PlainBackend

BackendName = Literal["auto", "plain", "cpu", "cuda"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A backend and one line that says why."""

    backend: Backend
    reason: str


def choose_backend(device: torch.device, dtype: torch.dtype, asked_for: BackendName = "auto") -> Chosen:
    """The fastest backend that serves ``dtype`` on ``device``, or the one that was asked for."""
    return Chosen(PlainBackend(), "the only one")
