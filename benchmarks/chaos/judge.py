"""Whether what a client got is what it would have got without faults, bit for bit. Pure.

An answer that was given up in the middle must be a beginning of the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moestro.cluster.edge.events import Choice, Completion, PositionLogprobs, StreamEvent
from moestro.cluster.verify.compare import compare


def judge_answer(case: str, expected: Completion, got: Completion) -> str:
    """The first thing that is not as expected, in a sentence; "" when all is."""
    difference = compare(case, expected, got).difference
    if difference is not None:
        return str(difference)
    if expected.prompt_logprobs is not None and got.prompt_logprobs is None:
        return f"request {case}: the prompt's log probabilities are missing"
    for before, after in zip(expected.choices, got.choices, strict=True):
        if (before.text, before.stop_string) != (after.text, after.stop_string):
            return (
                f"request {case}, choice {before.index}, text: {before.text!r} ({before.stop_string!r}) became "
                f"{after.text!r} ({after.stop_string!r})"
            )
    counts = [(each.usage.prompt_tokens, each.usage.output_tokens, each.seed) for each in (expected, got)]
    if counts[0] != counts[1]:
        return f"request {case}, tokens of prompt and output, and seed: {counts[0]} became {counts[1]}"
    return ""


def judge_beginning(case: str, expected: Completion, events: Sequence[StreamEvent]) -> str:
    """The same for a stream that may have been given up before its end."""
    numbers = [event.sequence_number for event in events]
    if numbers != list(range(len(events))):
        return f"request {case}, sequence numbers: a gap or a repeat in {numbers}"
    if not events:
        return ""
    if events[0].seed != expected.seed:
        return f"request {case}, seed: {expected.seed} became {events[0].seed}"
    parts = [_part(events, choice) for choice in expected.choices]
    texts = [choice.text for choice in parts]
    for whole, text in zip(expected.choices, texts, strict=True):
        if not whole.text.startswith(text):
            return f"request {case}, choice {whole.index}, text: {text!r} is no beginning of {whole.text!r}"
    got = replace(expected, choices=tuple(parts), prompt_logprobs=_prompt_logprobs(events))
    difference = compare(case, _cut(expected, parts), got).difference
    return "" if difference is None else str(difference)


def _part(events: Sequence[StreamEvent], whole: Choice) -> Choice:
    """What arrived of a choice; one that has not ended is given the ending that is expected."""
    deltas = [delta for event in events for delta in event.deltas if delta.index == whole.index]
    ended = next((delta for delta in deltas if delta.finish_reason is not None), None)
    return Choice(
        index=whole.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=whole.finish_reason if ended is None or ended.finish_reason is None else ended.finish_reason,
        logprobs=tuple(position for delta in deltas for position in delta.logprobs),
        stop_string=whole.stop_string if ended is None else ended.stop_string,
    )


def _cut(expected: Completion, parts: Sequence[Choice]) -> Completion:
    """As much of the whole answer as there is of the parts."""
    return replace(
        expected,
        choices=tuple(
            replace(
                choice,
                token_ids=choice.token_ids[: len(part.token_ids)],
                logprobs=choice.logprobs[: len(part.token_ids)],
            )
            for choice, part in zip(expected.choices, parts, strict=True)
        ),
    )


def _prompt_logprobs(events: Sequence[StreamEvent]) -> tuple[PositionLogprobs, ...] | None:
    return next((event.prompt_logprobs for event in events if event.prompt_logprobs is not None), None)
