"""What the harness needs of a cluster that it breaks. Everything else goes through the public client."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import psutil


class Role(Enum):
    RANK = "rank"
    GATEWAY = "gateway"
    SUPERVISOR = "supervisor"
    DIRECTORY = "directory"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Target:
    """A process that may be hurt."""

    role: Role
    name: str
    pid: int
    unit: str = ""  # those of one unit are of no use without each other: a tensor-parallel set; empty: alone


class NotPossible(Exception):
    """A fault cannot be had here; the message says why. The report names it as skipped."""


class NotNow(Exception):
    """There is nobody whom the fault could hit at this moment."""


class System(Protocol):
    """A cluster of processes on this machine."""

    @property
    def address(self) -> str:
        """Where clients call: host:port, several separated by commas."""

    @property
    def num_ranks(self) -> int:
        """Of all groups together, at full strength."""

    def ranks_lost_with(self, role: Role) -> int:
        """How many ranks go with one process of that role: a tensor-parallel set with a rank, a group with its
        supervisor."""

    def targets(self, role: Role) -> Sequence[Target]:
        """The processes of that role that are alive, in an order that does not depend on chance."""

    def processes(self) -> Sequence[psutil.Process]:
        """Every process of the cluster."""

    def partitioned(self, target: Target) -> AbstractContextManager[None]:
        """The target reaches nobody and nobody reaches it while the block runs. Raises NotPossible."""

    def full_disk(self) -> AbstractContextManager[None]:
        """Nothing can be written where the cluster writes while the block runs. Raises NotPossible."""
