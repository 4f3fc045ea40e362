"""When a call is tried again, where, and for how long. No I/O here; the clock is an argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from moestro.cluster.edge.statuses import DETAILS_KEY, error_of
from moestro.protos.errors import MoestroError, Overloaded, Unavailable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # between two attempts: doubled from one to the other
_NOT_REACHED = "failed to connect"
# What gRPC itself says, beside UNAVAILABLE, of a server that went away in mid-stream.
_CUT_OFF = (
    (grpc.StatusCode.CANCELLED, ""),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
    (grpc.StatusCode.INTERNAL, "RST_STREAM"),
)


def addresses_of(address: str | Sequence[str]) -> tuple[str, ...]:
    """``"a:1,b:2"`` or a sequence of such. Raises ValueError when there is none."""
    parts = address.split(",") if isinstance(address, str) else address
    found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not found:
        raise ValueError(f"no address in {address!r}")
    return found


class Route:
    """Which of several gateways is asked: the same one until it fails, then the next."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)
        self._at = 0

    @property
    def address(self) -> str:
        return self._addresses[self._at]

    def failed(self, address: str) -> None:
        """Calls that were under way together move on together."""
        if address == self.address:
            self._at = (self._at + 1) % len(self._addresses)

    def after(self, failure: grpc.RpcError, address: str, attempts: Attempts) -> float:
        """Seconds to wait before the next attempt at a call that failed at ``address``. Raises what the failure means
        when there is none."""
        error = error_from(failure)
        if isinstance(error, Unavailable | Overloaded):
            self.failed(address)
        return attempts.pause_after(error, was_cut_off(failure))


class Attempts:
    """How often and until when one call is tried: one that was refused or found nobody, ``retries`` times; one that was
    cut off by its server's end, or of which something has arrived, within ``resume_s`` seconds of each cut."""

    def __init__(self, retries: int, resume_s: float, timeout_s: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = retries
        self._resume_s = resume_s
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._pause_s = FIRST_PAUSE_S
        self._has_begun = False
        self._cut_s: float | None = None

    @property
    def remaining_s(self) -> float | None:
        """For this attempt; None: no deadline."""
        return None if self._deadline_s is None else self._deadline_s - self._clock()

    def arrived(self) -> None:
        """A part of the answer is here."""
        self._has_begun, self._cut_s, self._pause_s = True, None, FIRST_PAUSE_S

    def pause_after(self, error: Exception, was_cut_off: bool = False) -> float:
        """Seconds to wait before trying again, or raises the error when that would not help or the time is up."""
        now_s = self._clock()
        self._has_begun = self._has_begun or was_cut_off
        passing = (Unavailable, Overloaded) if self._has_begun else (Unavailable,)
        if not isinstance(error, passing):
            raise error
        pause_s = max(self._pause_s, error.retry_after_s)
        if self._has_begun:
            self._cut_s = now_s if self._cut_s is None else self._cut_s
            if now_s + pause_s > self._cut_s + self._resume_s:
                raise error
        elif self._left == 0:
            raise error
        else:
            self._left -= 1
        if self._deadline_s is not None and now_s + pause_s >= self._deadline_s:
            raise error
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s


def error_from(failure: grpc.RpcError) -> Exception:
    """An exception of ``protos.errors``, or TimeoutError."""
    if not isinstance(failure, grpc.Call | grpc.aio.AioRpcError):
        return MoestroError(str(failure))
    code = grpc.StatusCode.UNAVAILABLE if was_cut_off(failure) else failure.code()
    return error_of(code, failure.details() or "", _details(failure))


def was_cut_off(failure: grpc.RpcError) -> bool:
    """Whether the server went away after it was reached; it says nothing itself then, gRPC does."""
    if not isinstance(failure, grpc.Call | grpc.aio.AioRpcError) or _details(failure) is not None:
        return False
    code, message = failure.code(), failure.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return _NOT_REACHED not in message
    return any(code is cut and words in message for cut, words in _CUT_OFF)


def _details(failure: grpc.Call | grpc.aio.AioRpcError) -> bytes | None:
    metadata: Any = failure.trailing_metadata() or ()
    return next((value for key, value in metadata if key == DETAILS_KEY), None)
