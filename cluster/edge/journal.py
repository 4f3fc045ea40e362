"""The journal of one open request: what was asked, and what of the answer was accepted so far.

Sans-IO: deltas in, an event and cancels out; time is an argument. It holds all that is needed to go on elsewhere when
an engine is lost: ``sequences()`` of a journal with accepted tokens is the replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moestro.cluster.edge.events import ChoiceDelta, PositionLogprobs, StreamEvent, TokenLogprob, Usage
from moestro.cluster.edge.served import OpenText, TextModel, TextStream
from moestro.protos.errors import SequenceFailed, Unavailable
from moestro.protos.sequences import (
    Diagnostics,
    FinishReason,
    SamplingParams,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)

_ENDED_BY_TOKEN = (FinishReason.EOS, FinishReason.STOP_TOKEN)


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a request asks of the engine, settled."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]  # one per choice
    seed: int  # of the request; each choice's own is derived from it
    stop_strings: tuple[str, ...] = ()
    priority: int = 0
    diagnostics: Diagnostics = field(default_factory=Diagnostics)


@dataclass(slots=True)
class ChoiceRecord:
    """One choice so far."""

    sequence_id: str
    text: TextStream
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    ledger: SequenceLedger | None = None


class Acceptance(NamedTuple):
    """What follows from some deltas: an event for the caller (None: nothing to say), sequences to be cancelled."""

    event: StreamEvent | None
    cancel: tuple[str, ...]


class Journal:
    """See the module. Not to be used again after an exception of ``accept``."""

    def __init__(self, admitted: Admitted, model: TextModel, open_text: OpenText, now_s: float) -> None:
        self.admitted = admitted
        self.choices = [
            ChoiceRecord(f"{admitted.request_id}/{i}", open_text(admitted.prompt_ids, admitted.stop_strings))
            for i in range(len(admitted.sampling))
        ]
        self._token_text = model.token_text
        self._index = {choice.sequence_id: i for i, choice in enumerate(self.choices)}
        self._num_open = len(self.choices)
        self._next_number = 0
        self._started_s = now_s
        self.queued_s = 0.0  # how long the edge had it wait before it was started

    @property
    def num_written(self) -> int:
        """Tokens accepted, over all choices."""
        return sum(len(choice.output_ids) for choice in self.choices)

    @property
    def first_token_s(self) -> float | None:
        """When the first token of any choice was accepted."""
        return min((c.first_token_s for c in self.choices if c.first_token_s is not None), default=None)

    @property
    def finished(self) -> bool:
        """Every choice has ended; the last event had the usage."""
        return self._num_open == 0

    def sequences(self) -> list[SequenceRequest]:
        """What an engine must run from here: every choice that has not ended, with the tokens accepted so far."""
        admitted = self.admitted
        return [
            SequenceRequest(
                sequence_id=c.sequence_id,
                prompt_ids=admitted.prompt_ids,
                sampling=params,
                output_ids=tuple(c.output_ids),
                priority=admitted.priority,
                diagnostics=admitted.diagnostics,
            )
            for c, params in zip(self.choices, admitted.sampling, strict=True)
            if c.finish_reason is None
        ]

    def accept(self, deltas: Sequence[SequenceDelta], now_s: float) -> Acceptance:
        """Takes what the engine added. Deltas of a choice that has ended (they crossed its cancel) are dropped.
        Raises SequenceFailed when a sequence failed, Unavailable when the engine ended one unasked."""
        parts: dict[int, ChoiceDelta] = {}
        cancel: list[str] = []
        prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
        for delta in deltas:
            index = self._index[delta.sequence_id]
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue
            if delta.prompt_logprobs is not None:
                prompt_logprobs = tuple(map(self._position, delta.prompt_logprobs))
            part = self._accept_one(index, choice, delta, now_s)
            if part.finish_reason is FinishReason.STOP_STRING and delta.finish_reason is None:
                cancel.append(choice.sequence_id)
            parts[index] = part if index not in parts else _merge(parts[index], part)
        if not parts:
            return Acceptance(None, ())
        return Acceptance(self._event(tuple(parts.values()), prompt_logprobs), tuple(cancel))

    def _accept_one(self, index: int, choice: ChoiceRecord, delta: SequenceDelta, now_s: float) -> ChoiceDelta:
        reason = delta.finish_reason
        if reason is FinishReason.ERROR:
            # The engine's own words are for the log, not for the caller.
            raise SequenceFailed(f"choice {index} failed in the engine") from RuntimeError(delta.error)
        if reason is FinishReason.CANCELLED:
            raise Unavailable(f"choice {index} was ended by the engine")
        token_ids, text, stop_string = delta.token_ids, "", None
        if token_ids:
            visible = token_ids[:-1] if reason in _ENDED_BY_TOKEN else token_ids
            update = choice.text.push(visible)
            text, stop_string = update.text, update.stop_string
            if stop_string is not None:
                reason, token_ids = FinishReason.STOP_STRING, token_ids[: update.num_tokens_used]
            if choice.first_token_s is None:
                choice.first_token_s = now_s
            choice.last_token_s = now_s
            choice.output_ids += token_ids
        if reason is not None:
            if stop_string is None:
                text += choice.text.finish()
                stop_string = choice.text.stop_string  # half a character, released, may have completed one
                reason = reason if stop_string is None else FinishReason.STOP_STRING
            choice.finish_reason, choice.ledger = reason, delta.ledger
            self._num_open -= 1
        logprobs = tuple(map(self._position, delta.logprobs[: len(token_ids)])) if delta.logprobs else ()
        return ChoiceDelta(index, text, token_ids, logprobs, reason, stop_string, delta.trace)

    def _event(
        self, deltas: tuple[ChoiceDelta, ...], prompt_logprobs: tuple[PositionLogprobs, ...] | None
    ) -> StreamEvent:
        number = self._next_number
        self._next_number = number + 1
        admitted = self.admitted
        if number and self._num_open:
            return StreamEvent(admitted.request_id, number, deltas, prompt_logprobs=prompt_logprobs)
        return StreamEvent(
            request_id=admitted.request_id,
            sequence_number=number,
            deltas=deltas,
            model="" if number else admitted.model,
            seed=None if number else admitted.seed,
            usage=None if self._num_open else self._usage(),
            prompt_logprobs=prompt_logprobs,
        )

    def _usage(self) -> Usage:
        ledgers = [c.ledger or self._seen_from_here(c) for c in self.choices]
        return Usage(
            prompt_tokens=len(self.admitted.prompt_ids),
            output_tokens=self.num_written,
            cached_tokens=ledgers[0].num_cached_tokens,
            queued_s=self.queued_s + max(ledger.queued_s for ledger in ledgers),
            prefill_s=max(ledger.prefill_s for ledger in ledgers),
            decode_s=max(ledger.decode_s for ledger in ledgers),
            preemptions=sum(ledger.num_preemptions for ledger in ledgers),
        )

    def _seen_from_here(self, choice: ChoiceRecord) -> SequenceLedger:
        """A choice ended by a stop string has no ledger, since its engine saw a cancel: the edge's own times, which
        cannot tell queue from prefill."""
        first_s = choice.last_token_s if choice.first_token_s is None else choice.first_token_s
        started_s = self._started_s + self.queued_s
        return SequenceLedger(prefill_s=first_s - started_s, decode_s=choice.last_token_s - first_s)

    def _position(self, logprobs: TokenLogprobs | None) -> PositionLogprobs:
        if logprobs is None:
            return PositionLogprobs(None)
        text = self._token_text
        return PositionLogprobs(
            TokenLogprob(logprobs.token_id, logprobs.logprob, text(logprobs.token_id)),
            tuple(TokenLogprob(token, logprob, text(token)) for token, logprob in logprobs.top),
        )


def _merge(first: ChoiceDelta, second: ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        first.index,
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        second.finish_reason,
        second.stop_string,
        first.trace + second.trace,
    )
