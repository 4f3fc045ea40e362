"""The one mapping between our exceptions and gRPC statuses, in both directions.

A status carries google.rpc details: BadRequest with each violated field, RetryInfo where trying again may help,
ErrorInfo with a reason a program can switch on, RequestInfo with the request's id. See https://google.aip.dev/193.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from moestro.protos.errors import (
    ContextOverflow,
    FieldViolation,
    InvalidRequest,
    MoestroError,
    Overloaded,
    Quarantined,
    SequenceFailed,
    SlowConsumer,
    Superseded,
    Unavailable,
    UnknownModel,
)

DOMAIN = "moestro"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_CHARS = 400  # gRPC sends it percent-encoded in a header
MAX_VIOLATIONS = 32
MAX_DESCRIPTION_CHARS = 112

# The most special class first: the first that matches wins.
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode, str], ...] = (
    (ContextOverflow, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_OVERFLOW"),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (UnknownModel, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    (SlowConsumer, grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER"),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (Unavailable, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    (Quarantined, grpc.StatusCode.INTERNAL, "QUARANTINED"),
    (SequenceFailed, grpc.StatusCode.INTERNAL, "SEQUENCE_FAILED"),
    (Superseded, grpc.StatusCode.ABORTED, "SUPERSEDED"),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
)
_UNEXPECTED = (grpc.StatusCode.INTERNAL, "INTERNAL")


class Status(NamedTuple):
    """What a servicer aborts with."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, bytes], ...]


def status_of(error: BaseException, request_id: str) -> Status:
    """The status of any exception; one that we did not raise on purpose says nothing but the request's id."""
    code, reason = next(((c, r) for kind, c, r in _CODES if isinstance(error, kind)), _UNEXPECTED)
    message = f"internal error in request {request_id}" if reason == "INTERNAL" else str(error)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)]
    if isinstance(error, UnknownModel):
        details[0] = error_details_pb2.ErrorInfo(
            reason=reason, domain=DOMAIN, metadata={"model": error.name, "served": ",".join(error.served)}
        )
    if isinstance(error, Quarantined):
        details[0] = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"incident": error.incident})
    if isinstance(error, InvalidRequest):
        details.append(_bad_request(error))
    if isinstance(error, Overloaded | Unavailable):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    message = _shortened(message, MAX_MESSAGE_CHARS)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return Status(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def error_of(code: grpc.StatusCode, message: str, details: bytes | None) -> Exception:
    """The exception behind a status, for a client. ``details`` is the value of the trailing metadatum
    ``grpc-status-details-bin``."""
    unpacked = _unpack(details)
    retry_after_s = 0.2  # gRPC's own UNAVAILABLE, of a connection, says nothing
    if (retry := unpacked.get("RetryInfo")) is not None:
        retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9  # type: ignore[attr-defined]
    info = unpacked.get("ErrorInfo", error_details_pb2.ErrorInfo())
    reason, facts = info.reason, dict(info.metadata)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            bad = unpacked.get("BadRequest", error_details_pb2.BadRequest())
            fields = [FieldViolation(v.field, v.description) for v in bad.field_violations]
            kind = ContextOverflow if reason == "CONTEXT_OVERFLOW" else InvalidRequest
            return kind(fields or [FieldViolation("request", message)])
        case grpc.StatusCode.NOT_FOUND if reason == "UNKNOWN_MODEL":
            return UnknownModel(facts.get("model", ""), facts.get("served", "").split(","))
        case grpc.StatusCode.RESOURCE_EXHAUSTED if not reason and "larger than max" in message:
            return InvalidRequest([FieldViolation("request", message)])  # said by gRPC itself
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(message, retry_after_s)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message, retry_after_s)
        case grpc.StatusCode.CANCELLED:
            # Not by us, or nobody would read this: gRPC's server does it to a call that comes just when it is stopping.
            return Unavailable(f"the server cancelled the call: {message}", retry_after_s)
        case grpc.StatusCode.INTERNAL if reason == "QUARANTINED":
            return Quarantined(message, facts.get("incident", ""))
        case grpc.StatusCode.ABORTED if reason == "SUPERSEDED":
            return Superseded(message)
        case grpc.StatusCode.INTERNAL if reason == "SEQUENCE_FAILED":
            return SequenceFailed(message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutError(message)
    return MoestroError(f"{code.name}: {message}")


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    named = error.violations[:MAX_VIOLATIONS]
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=v.field, description=_shortened(v.description, MAX_DESCRIPTION_CHARS)
            )
            for v in named
        ]
    )


def _unpack(details: bytes | None) -> dict[str, Message]:
    """Details by the name of their type; what cannot be read is left out."""
    kinds = (
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
        error_details_pb2.ErrorInfo,
        error_details_pb2.RequestInfo,
    )
    unpacked: dict[str, Message] = {}
    try:
        status = status_pb2.Status.FromString(details or b"")
        for packed in status.details:
            for kind in kinds:
                if packed.Is(kind.DESCRIPTOR):
                    message = kind()
                    packed.Unpack(message)
                    unpacked[kind.DESCRIPTOR.name] = message
    except DecodeError:
        return {}
    return unpacked


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
