"""Two answers to one request, compared bit for bit. Pure.

Hidden states are compared at every position that both computed, up to the first output token that differs: from there
on the inputs differ too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from moestro.cluster.edge.events import Choice, Completion, PositionLogprobs, TokenLogprob


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in a request's answer that is not the same, and where the computation first went another way."""

    request: str
    choice: int
    what: str  # answer, prompt logprob, token, logprob, finish reason, hidden state
    index: int | None  # of the output token; for a prompt logprob, of the prompt's
    expected: str
    got: str
    position: int | None = None  # the first whose hidden state differs; None: none that both computed
    layer: int | None = None  # of the decoder, from 0; the first at that position

    def __str__(self) -> str:
        index = "" if self.index is None else f" {self.index}"
        text = f"request {self.request}, choice {self.choice}, {self.what}{index}: {self.expected} became {self.got}"
        if self.position is None:
            return text
        return f"{text}; the hidden state first differs at position {self.position}, after layer {self.layer}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much was compared, and the first difference."""

    tokens: int = 0
    logprobs: int = 0  # those of prompt tokens included
    hidden_states: int = 0
    difference: Difference | None = None

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tokens + other.tokens,
            self.logprobs + other.logprobs,
            self.hidden_states + other.hidden_states,
            self.difference or other.difference,
        )


def compare(request: str, expected: Completion, got: Completion) -> Comparison:
    """What is alike and the first that is not. Prompt log probabilities only when both have them."""
    total = Comparison()
    if len(expected.choices) != len(got.choices):
        counts = f"{len(expected.choices)} choices", f"{len(got.choices)} choices"
        return Comparison(difference=Difference(request, 0, "answer", None, *counts))
    if expected.prompt_logprobs is not None and got.prompt_logprobs is not None:
        total += _prompt_logprobs(request, expected.prompt_logprobs, got.prompt_logprobs)
    for before, after in zip(expected.choices, got.choices, strict=True):
        total += _choice(request, before, after)
    place, hidden_states = None, 0
    for before, after in zip(expected.choices, got.choices, strict=True):
        first, count = _hidden_states(expected.usage.prompt_tokens, before, after)
        hidden_states += count
        if first is not None and (place is None or (first[0], first[1]) < (place[0], place[1])):
            place = *first, before.index
    difference = total.difference
    if place is not None:
        position, layer, choice = place
        difference = difference or Difference(request, choice, "hidden state", None, "one digest", "another")
        difference = replace(difference, position=position, layer=layer)
    return replace(total, hidden_states=hidden_states, difference=difference)


def failed(request: str, reason: str) -> Comparison:
    """The comparison with an answer that never came."""
    return Comparison(difference=Difference(request, 0, "answer", None, "an answer", f"a failure ({reason})"))


def _prompt_logprobs(request: str, expected: Sequence[PositionLogprobs], got: Sequence[PositionLogprobs]) -> Comparison:
    for index, (before, after) in enumerate(zip_longest(expected, got)):
        if _exact(before) != _exact(after):
            difference = Difference(request, 0, "prompt logprob", index, *_first_unequal(before, after))
            return Comparison(logprobs=_count(expected[:index]), difference=difference)
    return Comparison(logprobs=_count(expected))


def _count(positions: Sequence[PositionLogprobs]) -> int:
    """The first prompt token has none."""
    return sum(position.token is not None for position in positions)


def _choice(request: str, expected: Choice, got: Choice) -> Comparison:
    index = -1
    for index, (before, after) in enumerate(zip_longest(expected.token_ids, got.token_ids)):
        if before != after:
            shown = ["the end" if token is None else str(token) for token in (before, after)]
            difference = Difference(request, expected.index, "token", index, shown[0], shown[1])
            return Comparison(index, min(index, len(expected.logprobs)), difference=difference)
        one, other = (choice.logprobs[index] if index < len(choice.logprobs) else None for choice in (expected, got))
        if _exact(one) != _exact(other):
            difference = Difference(request, expected.index, "logprob", index, *_first_unequal(one, other))
            return Comparison(index + 1, index, difference=difference)
    compared = Comparison(index + 1, len(expected.logprobs))
    endings = [(choice.finish_reason, choice.stop_string) for choice in (expected, got)]
    if endings[0] == endings[1]:
        return compared
    reasons = expected.finish_reason.value, got.finish_reason.value
    return replace(compared, difference=Difference(request, expected.index, "finish reason", None, *reasons))


def _hidden_states(num_prompt: int, expected: Choice, got: Choice) -> tuple[tuple[int, int] | None, int]:
    """The first (position, layer) that differs, and how many were compared."""
    pairs = zip(expected.token_ids, got.token_ids, strict=False)
    num_alike = next((i for i, (before, after) in enumerate(pairs) if before != after), len(expected.token_ids))
    reference = {trace.position: trace.layers for trace in reversed(expected.trace)}
    first, count = None, 0
    for trace in got.trace:
        if trace.position >= num_prompt + num_alike or trace.position not in reference:
            continue
        layers = zip_longest(reference[trace.position], trace.layers)
        layer = next((i for i, (before, after) in enumerate(layers) if before != after), None)
        count += len(trace.layers)
        if layer is not None and (first is None or (trace.position, layer) < first):
            first = trace.position, layer
    return first, count


def _exact(position: PositionLogprobs | None) -> list[tuple[int, str] | None] | None:
    """Equal only for equal bits: a float's own equality does not tell 0 from -0."""
    return None if position is None else [_bits(position.token), *map(_bits, position.top)]


def _bits(token: TokenLogprob | None) -> tuple[int, str] | None:
    return None if token is None else (token.token_id, token.logprob.hex())


def _first_unequal(before: PositionLogprobs | None, after: PositionLogprobs | None) -> tuple[str, str]:
    """The first entries of two positions that differ, in words."""
    if before is None or after is None:
        return _show(before and before.token), _show(after and after.token)
    entries = zip_longest((before.token, *before.top), (after.token, *after.top))
    one, other = next(pair for pair in entries if _bits(pair[0]) != _bits(pair[1]))
    return _show(one), _show(other)


def _show(token: TokenLogprob | None) -> str:
    return "nothing" if token is None else f"{token.logprob!r} for token {token.token_id}"
