"""Every error Moestro raises on purpose.

    MoestroError
    ├── InvalidRequest        the caller sent something that can never work     INVALID_ARGUMENT
    │   └── ContextOverflow   prompt and output do not fit the context          INVALID_ARGUMENT
    ├── UnknownModel          no such model is served here                      NOT_FOUND
    ├── Overloaded            a bound of ours was reached; try again later      RESOURCE_EXHAUSTED
    │   └── SlowConsumer      the client did not read; it may resume            RESOURCE_EXHAUSTED
    ├── Unavailable           no rank can take it now; try again later          UNAVAILABLE
    │   └── EngineLost        the engine that ran it is gone; can go on elsewhere
    ├── SequenceFailed        this one request failed inside the engine         INTERNAL
    │   └── Quarantined       it was there each time that a worker died         INTERNAL
    ├── Superseded            the same stream was resumed by a later call       ABORTED
    ├── ConfigError           configuration file or option                      (at start)
    └── CheckpointError       a checkpoint that must not be served              (at start)

Messages are for the caller: they name the field, the bound and the value, never a path of the server or a stack trace
(ConfigError and CheckpointError are for the operator and do name files).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is out of its bounds: ``field`` as a proto path (``sampling.top_p``)."""

    field: str
    description: str


class MoestroError(Exception):
    """The root of every error raised on purpose."""


class InvalidRequest(MoestroError):
    """A request that can never work, with every violated field."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


class ContextOverflow(InvalidRequest):
    """Prompt and output do not fit the model's context or this server's KV pool."""


class UnknownModel(MoestroError):
    """The named model is not served here."""

    def __init__(self, name: str, served: Sequence[str]) -> None:
        self.name, self.served = name, tuple(served)
        super().__init__(f"model {name!r} is not served here; served: {', '.join(served)}")


class Overloaded(MoestroError):
    """A bound was reached. ``retry_after_s`` is an honest guess."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class SlowConsumer(Overloaded):
    """The client did not read its stream, which was cut off. It can be resumed."""


class Unavailable(MoestroError):
    """Nothing can take the request now."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineLost(Unavailable):
    """The engine that ran a request is gone, or has the request no more. The request can go on elsewhere.

    ``died``: the engine ended in a way that the request may have caused; not so when it was asked to go, or when only a
    neighbour was lost. ``engine`` names it to operators."""

    def __init__(self, message: str, *, died: bool, engine: str = "", retry_after_s: float = 1.0) -> None:
        self.died = died
        self.engine = engine
        super().__init__(message, retry_after_s)


class SequenceFailed(MoestroError):
    """One sequence failed inside the engine; its neighbours did not."""


class Quarantined(SequenceFailed):
    """The request was running each time that a worker died, and is not tried again. ``incident`` names the record."""

    def __init__(self, message: str, incident: str) -> None:
        self.incident = incident
        super().__init__(message)


class Superseded(MoestroError):
    """A later call has resumed this stream and goes on with it."""


class ConfigError(MoestroError):
    """A configuration that cannot be used: names file, field, bound and value."""


class CheckpointError(MoestroError):
    """A checkpoint that cannot be served: names file, tensor and reason."""


class ExpertsDoNotFit(MoestroError):
    """The ranks that are left cannot hold all experts of the model."""
