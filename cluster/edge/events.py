"""What a caller sees of a request, whatever the transport: gRPC, HTTP, in this process, and the Python client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moestro.protos.sequences import FinishReason, PositionTrace


class TokenLogprob(NamedTuple):
    """One token at one position."""

    token_id: int
    logprob: float
    text: str


class PositionLogprobs(NamedTuple):
    """The model's own log probabilities at one position. ``token`` is None for the first prompt token."""

    token: TokenLogprob | None
    top: tuple[TokenLogprob, ...] = ()  # from the most likely


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used and where its time went: token counts over all choices, seconds of its slowest choice."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the KV cache by the first choice
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0
    migrations: int = 0  # times that its engine was lost and it went on elsewhere


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What was added to one choice. ``text`` may lag behind ``token_ids`` while it may become a stop string or is half
    a character; with ``finish_reason`` set nothing is held back any more."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    trace: tuple[PositionTrace, ...] = ()  # of the positions computed, when asked for


class StreamEvent(NamedTuple):
    """One message of a stream. The first has sequence_number 0; there is never a gap or a repeat."""

    request_id: str
    sequence_number: int
    deltas: tuple[ChoiceDelta, ...]
    model: str = ""  # in the first event
    seed: int | None = None  # in the first event
    usage: Usage | None = None  # in the last event, and only there
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None

    @property
    def text(self) -> str:
        """What was added to choice 0; for a request of one choice, all there is."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[PositionLogprobs, ...] = ()
    stop_string: str | None = None
    trace: tuple[PositionTrace, ...] = ()  # in the order computed, when asked for; only when gathered from a stream


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    model: str
    seed: int
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


def gather(events: Iterable[StreamEvent]) -> Completion:
    """The whole answer from all events of its stream, in order."""
    events = list(events)
    first, last = events[0], events[-1]
    if first.seed is None or last.usage is None:
        raise ValueError("not a whole stream: the first event has the seed, the last the usage")
    parts: dict[int, list[ChoiceDelta]] = {}
    for event in events:
        for delta in event.deltas:
            parts.setdefault(delta.index, []).append(delta)
    return Completion(
        request_id=first.request_id,
        model=first.model,
        seed=first.seed,
        choices=tuple(_join(parts[index]) for index in sorted(parts)),
        usage=last.usage,
        prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
    )


def _join(deltas: list[ChoiceDelta]) -> Choice:
    last = deltas[-1]
    if last.finish_reason is None:
        raise ValueError(f"choice {last.index} never finished")
    return Choice(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=last.finish_reason,
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        stop_string=last.stop_string,
        trace=tuple(position for delta in deltas for position in delta.trace),
    )
