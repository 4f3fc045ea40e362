"""The journal of one open request: what was asked, and what of the answer was accepted so far.

Sans-IO: deltas in, an event and cancels out; time is an argument. It holds all that is needed to go on elsewhere when
an engine is lost: ``restart()`` of a journal with accepted tokens is the replay.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moestro.cluster.edge.admitted import Admitted
from moestro.cluster.edge.events import ChoiceDelta, PositionLogprobs, StreamEvent, TokenLogprob, Usage
from moestro.cluster.edge.history import Arrived, History, mark
from moestro.cluster.edge.resuming import check_arrived
from moestro.cluster.edge.served import OpenText, TextModel, TextStream
from moestro.protos.errors import FieldViolation, InvalidRequest, SequenceFailed, Unavailable
from moestro.protos.sequences import (
    FinishReason,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)

# Tokens after which a choice got further than the engine that died with it: that one may have drawn some untold.
PROGRESS = 4
_ENDED_BY_TOKEN = (FinishReason.EOS, FinishReason.STOP_TOKEN)


@dataclass(slots=True)
class ChoiceRecord:
    """One choice so far. Times are of its run on the present engine, ``spent`` is what went to earlier ones."""

    sequence_id: str
    text: TextStream
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    finish_number: int = 0  # of the event that said so
    num_deaths: int = 0  # of engines while it ran, since it last got anywhere
    died_at: int = 0  # how many tokens it had at the last of them
    first_token_s: float | None = None
    last_token_s: float = 0.0
    ledger: SequenceLedger | None = None
    spent: SequenceLedger = field(default_factory=SequenceLedger)


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
        self._marks = array("Q")  # see History
        self._first_number = self._next_number = 0
        self._started_s = now_s  # of the present run
        self.num_migrations = 0
        self.queued_s = 0.0  # at the edge

    def wait(self, seconds: float) -> None:
        """The edge had it wait so long before it was started."""
        self.queued_s += seconds
        self._started_s += seconds

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

    @property
    def num_deaths(self) -> int:
        """Engines that died while a choice ran, and it has had less than PROGRESS tokens since."""
        return max((choice.num_deaths for choice in self.choices if choice.finish_reason is None), default=0)

    def resume(self, arrived: Arrived) -> None:
        """Takes up a stream where its client was; to be called first. Raises InvalidRequest when that cannot be."""
        check_arrived(arrived, self.admitted.sampling)
        self._first_number = self._next_number = arrived.next_number
        for index, (token_ids, reason) in sorted(arrived.choices.items()):
            choice = self.choices[index]
            choice.output_ids += token_ids
            self._marks.append(mark(0, index, len(token_ids)))
            if reason is not None:
                choice.finish_reason, choice.finish_number = reason, arrived.next_number - 1
                choice.ledger = SequenceLedger()
                self._num_open -= 1
            elif any(choice.text.push((token,)).stop_string is not None for token in token_ids):
                described = "holds a stop string, so its finish_reason must be set"
                raise InvalidRequest([FieldViolation("resume.choices", f"choice {index} {described}")])

    def history(self) -> History:
        """What was sent so far."""
        return History(
            digest=self.admitted.digest,
            token_ids=[array("I", choice.output_ids) for choice in self.choices],
            endings=[None if c.finish_reason is None else (c.finish_reason, c.finish_number) for c in self.choices],
            marks=self._marks,
            first_number=self._first_number,
            next_number=self._next_number,
        )

    def interrupt(self, now_s: float) -> None:
        """The present run has ended and none of it will be told any more."""
        for choice in self._open_choices():
            choice.spent = _sum(choice.spent, self._seen_from_here(choice, now_s))
            choice.first_token_s = None
        self._started_s = now_s

    def lose(self, died: bool, now_s: float) -> None:
        """The engine is lost; ``died`` as of EngineLost."""
        self.interrupt(now_s)
        self.num_migrations += 1
        for choice in self._open_choices():
            if died:
                choice.num_deaths, choice.died_at = choice.num_deaths + 1, len(choice.output_ids)

    def restart(self, now_s: float) -> list[SequenceRequest]:
        """The replay: ``sequences()`` for another engine, from now on."""
        waited = SequenceLedger(queued_s=now_s - self._started_s)
        for choice in self._open_choices():
            choice.spent = _sum(choice.spent, waited)
        self._started_s = now_s
        return self.sequences()

    def sequences(self) -> list[SequenceRequest]:
        """What an engine must run from here: every choice that has not ended, with the tokens accepted so far."""
        admitted = self.admitted
        moved = self.num_migrations or self._first_number  # then the rank that was asked for may be lost
        diagnostics = replace(admitted.diagnostics, rank="") if moved else admitted.diagnostics
        return [
            SequenceRequest(
                sequence_id=c.sequence_id,
                prompt_ids=admitted.prompt_ids,
                # The prompt's come with the first token.
                sampling=params if not c.output_ids else replace(params, prompt_logprobs=None),
                output_ids=tuple(c.output_ids),
                priority=admitted.priority,
                diagnostics=diagnostics,
            )
            for c, params in zip(self.choices, admitted.sampling, strict=True)
            if c.finish_reason is None
        ]

    def accept(self, deltas: Sequence[SequenceDelta], now_s: float) -> Acceptance:
        """Takes what the engine added. Deltas of a choice that has ended (they crossed its cancel) are dropped.
        Raises SequenceFailed when a sequence failed, Unavailable when the engine ended one unasked."""
        parts: dict[int, ChoiceDelta] = {}
        event = self._next_number - self._first_number + 1
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
            self._marks.append(mark(event, index, len(choice.output_ids)))
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
            if choice.num_deaths and len(choice.output_ids) >= choice.died_at + PROGRESS:
                choice.num_deaths = 0
        if reason is not None:
            if stop_string is None:
                text += choice.text.finish()
                stop_string = choice.text.stop_string  # half a character, released, may have completed one
                reason = reason if stop_string is None else FinishReason.STOP_STRING
            choice.finish_reason, choice.finish_number, choice.ledger = reason, self._next_number, delta.ledger
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
        ledgers = [_sum(c.spent, c.ledger or self._seen_from_here(c, c.last_token_s)) for c in self.choices]
        return Usage(
            prompt_tokens=len(self.admitted.prompt_ids),
            output_tokens=self.num_written,
            cached_tokens=ledgers[0].num_cached_tokens,
            queued_s=self.queued_s + max(ledger.queued_s for ledger in ledgers),
            prefill_s=max(ledger.prefill_s for ledger in ledgers),
            decode_s=max(ledger.decode_s for ledger in ledgers),
            preemptions=sum(ledger.num_preemptions for ledger in ledgers),
            migrations=self.num_migrations,
        )

    def _open_choices(self) -> list[ChoiceRecord]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    def _seen_from_here(self, choice: ChoiceRecord, end_s: float) -> SequenceLedger:
        """A choice ended by a stop string has no ledger, since its engine saw a cancel, nor has one whose engine was
        lost: the edge's own times, which cannot tell queue from prefill."""
        first_s = end_s if choice.first_token_s is None else choice.first_token_s
        return SequenceLedger(prefill_s=first_s - self._started_s, decode_s=end_s - first_s)

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


def _sum(before: SequenceLedger, last: SequenceLedger) -> SequenceLedger:
    """Of two runs of one sequence. What was found in the cache, the last one knows."""
    return SequenceLedger(
        queued_s=before.queued_s + last.queued_s,
        prefill_s=before.prefill_s + last.prefill_s,
        decode_s=before.decode_s + last.decode_s,
        num_cached_tokens=last.num_cached_tokens,
        num_preemptions=before.num_preemptions + last.num_preemptions,
        num_steps=before.num_steps + last.num_steps,
    )
