"""The axes of a group and what tensor parallelism needs of them.

A group is ``dp × tp`` ranks, numbered ``rank = dp_rank * tp + tp_rank``. Attention is data-parallel over ``dp`` and
tensor-parallel over ``tp``; experts are spread over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # who only needs shapes is quicker without
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupShape:
    """How many ranks a group has along each axis."""

    dp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    def dp_rank(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def leader(self, rank: int) -> int:
        """The rank that talks to gateways for this one's tensor-parallel set."""
        return rank - rank % self.tp


class TensorParallel(Protocol):
    """Collectives within one tensor-parallel set. All are called by every rank of the set, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def wait_s(self) -> float:
        """Seconds that the host has spent in these collectives, where somebody counts them."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the set in rank order (gather, then add), the same bits on every rank."""

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenation of every rank's ``x`` (same shape on each) along ``dim``, in rank order."""


@dataclass(frozen=True, slots=True)
class NoTensorParallel:
    """A set of one."""

    rank: int = 0
    size: int = 1
    wait_s: float = 0.0

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x


class TensorParallelSeat:
    """A place in a tensor-parallel set that is there before the set's collectives, and outlives them: a model is loaded
    for a seat, and takes part in one epoch after another through ``join``."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.wait_s = rank, size, 0.0
        self._joined: TensorParallel | None = NoTensorParallel() if size == 1 else None

    def join(self, tp: TensorParallel) -> None:
        """From now on computes with the collectives of ``tp``. Raises ValueError if they are another seat's."""
        if (tp.rank, tp.size) != (self.rank, self.size):
            raise ValueError(f"seat {self.rank} of {self.size} cannot take rank {tp.rank} of {tp.size}")
        self._joined = tp

    def sum(self, x: Tensor) -> Tensor:
        start = perf_counter()
        total = self._collectives.sum(x)
        self.wait_s += perf_counter() - start
        return total

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        start = perf_counter()
        gathered = self._collectives.gather(x, dim)
        self.wait_s += perf_counter() - start
        return gathered

    @property
    def _collectives(self) -> TensorParallel:
        if self._joined is None:
            raise RuntimeError("this rank has not joined its tensor-parallel set yet")
        return self._joined
