"""What verify needs of a cluster. ``grpc_target`` has it from a gateway; tests may have it from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moestro.cluster.client_results import ClusterStatus, ModelInfo
from moestro.cluster.edge.events import Completion
from moestro.cluster.verify.suite import Case
from moestro.protos.sequences import Diagnostics


class NotApplicable(Exception):
    """A perturbation cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class ExpertState:
    """How far the experts of one group have moved."""

    switched_layers: int  # since the start
    is_moving: bool  # more are to be


class Target(Protocol):
    """A cluster that answers requests and can be disturbed."""

    async def model(self) -> ModelInfo:
        """The model that is asked."""

    async def tokenize(self, text: str) -> list[int]: ...

    async def status(self) -> ClusterStatus: ...

    async def ask(self, case: Case, diagnostics: Diagnostics) -> Completion:
        """The whole answer, gathered from a stream. Raises MoestroError, or TimeoutError."""

    async def experts(self, group: str) -> ExpertState:
        """Raises NotApplicable when the server cannot say."""

    async def set_placement(self, group: str, random_seed: int | None) -> None:
        """Begins to move the experts to where the seed says; None: to the even placement that a group starts with.
        Raises NotApplicable when the server refuses."""
