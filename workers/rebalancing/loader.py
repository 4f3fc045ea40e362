"""Experts from the checkpoint, beside serving.

A rank reads what it is to hold from the checkpoint, as it did at its start, and not from the rank that holds it now:
nobody else takes part, so an interruption leaves nobody waiting and what is wrong in one rank's memory does not spread.

Legend: W expert width, M model width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.backend import Backend
from moestro.workers.model.moe import ExpertBank, expert_fill
from moestro.workers.model.weights import WeightSource
from moestro.workers.rebalancing.background import Cancelled

OpenSource = Callable[[], AbstractContextManager[WeightSource]]


class Budget:
    """Bytes per second, kept by waiting after each piece. Raises Cancelled from a wait when ``cancelled`` is set."""

    def __init__(self, bytes_per_s: float, cancelled: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._cancelled = cancelled
        self._free_at = time.monotonic()
        self.spent = 0

    def spend(self, num_bytes: int) -> None:
        self.spent += num_bytes
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        if self._cancelled.wait(max(0.0, self._free_at - now)):
            raise Cancelled


@dataclass(frozen=True, slots=True)
class BudgetedSource:
    """A weight source that spends from a budget."""

    source: WeightSource
    budget: Budget

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def backend(self) -> Backend:
        return self.source.backend

    def read_(self, out: Tensor, name: str, row: int = 0, column: int = 0) -> None:
        self.source.read_(out, name, row, column)
        self.budget.spend(out.nbytes)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One layer's new experts by local slot, ready to be switched to."""

    staged: dict[int, Any]
    num_bytes: int


def load_experts(
    bank: ExpertBank,
    slots: Sequence[tuple[int, int]],
    open_source: OpenSource,
    bytes_per_s: float,
    cancelled: threading.Event,
) -> Loaded:
    """Reads and stages ``slots``, pairs of local slot and logical expert. Raises Cancelled, and CheckpointError when
    the checkpoint cannot be read any more."""
    budget = Budget(bytes_per_s, cancelled)
    staged = {}
    with open_source() as source:
        for slot, expert in slots:
            fill = expert_fill(BudgetedSource(source, budget), bank.prefix, expert)
            staged[slot] = bank.experts.stage(fill)
    return Loaded(staged, budget.spent)
