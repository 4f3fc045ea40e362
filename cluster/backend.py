"""The seam between the edge and whatever runs sequences.

Three implementations: ranks of a cluster over gRPC, an engine in this process, and a stub for tests and for measuring
the edge alone. The edge never knows which it talks to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moestro.protos.errors import FieldViolation, InvalidRequest
from moestro.protos.sequences import EngineLimits, SequenceDelta, SequenceRequest

MAX_NAMED = 8  # ranks and groups named in a refusal


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a backend serves well at one time of the requests that come through here. More would only wait there."""

    sequences: int
    tokens: int  # prompt and output


class DeltaStream(Protocol):
    """The deltas of the sequences of one request, as they come, in order within each sequence."""

    async def next(self) -> list[SequenceDelta]:
        """Waits for at least one delta and returns all there are. Raises EngineLost when the request can go on
        elsewhere, Overloaded when the engine would not take it on, Unavailable when nobody will.
        After every sequence has had a delta with a finish_reason it must not be called again."""

    def cancel(self, sequence_id: str) -> None:
        """Ends one sequence early; its blocks are freed within two steps. No delta of it follows. Idempotent, and
        allowed after its end."""

    def close(self) -> None:
        """Cancels what is left. A ``next`` that waits raises Unavailable. Idempotent."""

    def num_unread(self) -> int:
        """Tokens that have come and were not asked for."""


class Backend(Protocol):
    """Runs sequences."""

    @property
    def limits(self) -> EngineLimits: ...

    def capacity(self) -> Capacity:
        """As of now: it changes with the ranks there are, with their memory and with what other gateways put there."""

    def start(self, sequences: Sequence[SequenceRequest]) -> DeltaStream:
        """Starts the sequences of one request together, on one rank; on that of their diagnostics when these name one.
        Raises Overloaded or Unavailable, or InvalidRequest for a rank that nobody knows, with nothing started."""

    async def available(self) -> None:
        """Returns when some engine can take sequences. Raises Unavailable when none ever will."""

    async def outlived(self, engine: str) -> bool:
        """Whether an engine that was lost as if it had died lives: only the connection to it broke. Returns when that
        can be told; an engine of which nobody can tell is taken to live."""


def unknown_rank(name: str, known: Sequence[str]) -> InvalidRequest:
    """The refusal of a request that is to be served by ``name``."""
    shown = ", ".join(repr(each) for each in known[:MAX_NAMED])
    more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    described = f"must be one of {shown}{more}, is {name[:64]!r}"
    return InvalidRequest([FieldViolation("diagnostics.rank", described)])
