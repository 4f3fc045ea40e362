"""What happened to one request, as the client saw it. All times are seconds since the start of its round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLedger:
    """What the server says of a request in its last message."""

    cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The timeline of one request.

    Latencies count from ``scheduled_s``: a client that is late in sending must not make the server look fast. In a
    closed loop a request is due when it is sent, so both are equal there. ``message_times_s`` and
    ``message_tokens`` hold the messages that carried at least one token, in order. Every request sent has a record:
    ``error`` is None when it completed with at least one token, else the code of its failure.
    """

    index: int
    scheduled_s: float
    sent_s: float
    done_s: float  # the stream had ended, well or badly
    asked_tokens: int
    input_tokens: int | None  # the server's count when it gives one, else the client's
    message_times_s: tuple[float, ...] = ()
    message_tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    error_message: str | None = None
    ledger: ServerLedger | None = None

    @property
    def output_tokens(self) -> int:
        return sum(self.message_tokens)

    @property
    def client_lag_s(self) -> float:
        """How late the load generator sent it."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token. Needs at least one."""
        return self.message_times_s[0] - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None when there is no token after the first."""
        later = self.output_tokens - 1
        return (self.message_times_s[-1] - self.message_times_s[0]) / later if later > 0 else None

    @property
    def e2e_s(self) -> float:
        """Until the end of the stream, which is when a caller knows that the answer is whole."""
        return self.done_s - self.scheduled_s

    def itl_s(self) -> list[float]:
        """The gap before every token after the first, as it reached the client: tokens that share a message came
        together, so all but the first of them have a gap of 0."""
        gaps = [0.0] * (self.output_tokens - 1)
        position = self.message_tokens[0] - 1 if self.message_tokens else 0
        for previous, time, tokens in zip(
            self.message_times_s, self.message_times_s[1:], self.message_tokens[1:], strict=False
        ):
            gaps[position] = time - previous
            position += tokens
        return gaps
