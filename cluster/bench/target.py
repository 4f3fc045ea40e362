"""The seam between the benchmark and whatever it drives: a Moestro cluster, another server, an engine in this process.

A target says what arrived; the driver says when. So every target is measured by the same clock in the same place.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from moestro.cluster.bench.records import ServerLedger
from moestro.cluster.bench.workload import BenchRequest


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """Who answers. None: the target does not say, or it does not apply."""

    kind: str  # the protocol or engine: "moestro-grpc"
    model: str
    version: str | None = None
    vocab_size: int | None = None
    max_context: int | None = None  # prompt and output tokens together
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of a stream. The fields but ``num_tokens`` come when they are known, usually with the last one."""

    num_tokens: int  # output tokens that came with it; 0 is allowed (text that was held back, usage alone)
    finish_reason: str | None = None
    input_tokens: int | None = None
    ledger: ServerLedger | None = None


class TargetError(Exception):
    """A request that failed. ``code`` is short and countable (``RESOURCE_EXHAUSTED``, ``HTTP_503``)."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


class Target(Protocol):
    """Something that answers requests. Used from one event loop, with many requests open at a time."""

    async def describe(self) -> TargetInfo:
        """Who answers; also the check that somebody does. Raises TargetError."""

    def run(self, request: BenchRequest) -> AsyncGenerator[Chunk]:
        """Sends the request when first iterated and yields each message as soon as it has arrived, doing as little as
        possible in between. Closing the generator early cancels the request. Raises TargetError."""

    async def close(self) -> None:
        """Releases connections. Idempotent."""
