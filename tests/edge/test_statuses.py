"""Exceptions to statuses and back, and how large a status can become."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.edge.parsing import parse
from moestro.cluster.edge.statuses import MAX_VIOLATIONS, error_of, status_of
from moestro.protos.errors import (
    ContextOverflow,
    FieldViolation,
    InvalidRequest,
    MoestroError,
    Overloaded,
    Quarantined,
    SequenceFailed,
    Superseded,
    Unavailable,
    UnknownModel,
)
from moestro.protos.gen import inference_pb2 as pb

VIOLATIONS = [
    FieldViolation("sampling.top_p", "must be in (0, 1], is 2.0"),
    FieldViolation("text", "must not be empty"),
]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest(VIOLATIONS), grpc.StatusCode.INVALID_ARGUMENT),
        (ContextOverflow(VIOLATIONS), grpc.StatusCode.INVALID_ARGUMENT),
        (UnknownModel("a", ["b", "c"]), grpc.StatusCode.NOT_FOUND),
        (Overloaded("full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("gone", 0.25), grpc.StatusCode.UNAVAILABLE),
        (SequenceFailed("choice 0 failed"), grpc.StatusCode.INTERNAL),
        (Quarantined("2 ranks died", "incident-1"), grpc.StatusCode.INTERNAL),
        (Superseded("resumed"), grpc.StatusCode.ABORTED),
        (TimeoutError("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_there_and_back(error: Exception, code: grpc.StatusCode) -> None:
    status = status_of(error, "r1")
    assert status.code is code
    back = error_of(status.code, status.message, status.metadata[0][1])
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_what_nobody_raised_on_purpose_stays_inside() -> None:
    status = status_of(KeyError("/etc/secret"), "r1")
    assert (status.code, status.message) == (grpc.StatusCode.INTERNAL, "internal error in request r1")
    assert b"secret" not in status.metadata[0][1]
    assert type(error_of(status.code, status.message, status.metadata[0][1])) is MoestroError


@pytest.mark.parametrize("details", [None, b"", b"\xff\xff", b"\x1a\x02\x0a\x00"])
def test_details_that_cannot_be_read(details: bytes | None) -> None:
    error = error_of(grpc.StatusCode.INVALID_ARGUMENT, "said by a proxy", details)
    assert isinstance(error, InvalidRequest)
    assert error.violations == (FieldViolation("request", "said by a proxy"),)
    assert isinstance(error_of(grpc.StatusCode.UNAVAILABLE, "no connection", details), Unavailable)


def test_a_call_that_the_server_cancelled_may_be_made_again() -> None:
    error = error_of(grpc.StatusCode.CANCELLED, "CANCELLED", None)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s > 0


def test_the_largest_status_fits_into_trailers() -> None:
    violations = [FieldViolation(f"sampling.logit_bias[{2**32 - i}]", "x" * 500) for i in range(500)]
    status = status_of(InvalidRequest(violations), "r" * 128)
    details = status.metadata[0][1]
    assert 4 / 3 * len(details) + len(status.message) < 8000, "gRPC's default bound is 8 KiB, details in base64"
    back = error_of(status.code, status.message, details)
    assert isinstance(back, InvalidRequest)
    assert len(back.violations) == MAX_VIOLATIONS


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_invalid_request(data: bytes) -> None:
    try:
        parse(pb.GenerateRequest, data)
    except InvalidRequest as error:
        assert len(error.violations) == 1  # noqa: PT017 - it may also be a message


@settings(deadline=None)
@given(st.data())
def test_a_damaged_message_is_a_message_or_an_invalid_request(data: st.DataObject) -> None:
    whole = pb.GenerateRequest(
        text="abc", stop=pb.StopParams(strings=["a", "b"]), sampling=pb.SamplingParams(logit_bias={1: 2.0}), model="m"
    ).SerializeToString()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    try:
        parse(pb.GenerateRequest, damaged[: data.draw(st.integers(0, len(damaged)))])
    except InvalidRequest as error:
        assert error.violations[0].field  # noqa: PT017 - it may also be a message
