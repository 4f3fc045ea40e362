"""The right answer of every request, by the definition of its parameters.

The simulated model reads a sequence token by token into one number, its *name*, and draws the next token from the name
alone (greedy) or from name, seed and position (sampled). So the whole answer is known before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moestro.protos.sequences import FinishReason, SamplingParams, TokenLogprobs

VOCABULARY = 26  # token i is written as the i-th small letter
EOS = 0
POISON = 26  # a token that kills whoever computes a certain position behind it
NOT_A_NUMBER = 27  # a token whose hidden state is not a number
VOCAB_SIZE = 28

ROOT = 12345
_PRIME = 2**61 - 1


def read(name: int, token: int) -> int:
    """The name of a sequence with one more token."""
    return (name * 1_000_003 + token + 1) % _PRIME


def draw(name: int, sampling: SamplingParams, position: int) -> int:
    """The token that follows; ``position`` is its own, counted from the start of the prompt."""
    noise = 0 if sampling.temperature == 0 else sampling.seed * 7919 + position
    return (name ^ noise * 0x9E3779B97F4A7C15) % 65521 % VOCABULARY


def logprobs(name: int, token: int, count: int) -> TokenLogprobs:
    """What the model says of a token that follows a name, and of the ``count`` likeliest."""
    return TokenLogprobs(token, -(name % 97) / 8, tuple((i, -1.0 - i - (name % 13) / 16) for i in range(count)))


def letters(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in token_ids)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one choice."""

    token_ids: tuple[int, ...]
    text: str
    reason: FinishReason
    stop_string: str | None
    logprobs: tuple[TokenLogprobs, ...]  # empty when not asked for


def right_answer(
    prompt_ids: Sequence[int], sampling: SamplingParams, stop_strings: Sequence[str], context_limit: int
) -> Answer:
    """From the definitions of the parameters, without a scheduler, a journal or a cluster."""
    name, text = ROOT, ""
    output: list[int] = []
    told: list[TokenLogprobs] = []
    for token in prompt_ids:
        name = read(name, token)
    while True:
        position = len(prompt_ids) + len(output)
        token = draw(name, sampling, position)
        if sampling.logprobs is not None:
            told.append(logprobs(name, token, sampling.logprobs))
        name = read(name, token)
        output.append(token)

        def answer(text: str, reason: FinishReason, stop: str | None = None) -> Answer:
            return Answer(tuple(output), text, reason, stop, tuple(told))

        if len(output) > sampling.min_tokens:
            if token in sampling.eos_token_ids and not sampling.ignore_eos:
                return answer(text, FinishReason.EOS)
            if token in sampling.stop_token_ids:
                return answer(text, FinishReason.STOP_TOKEN)
        text += letters([token])
        stops = [stop for stop in stop_strings if text.endswith(stop)]
        if stops:
            longest = max(stops, key=len)
            return answer(text.removesuffix(longest), FinishReason.STOP_STRING, longest)
        if len(output) == sampling.max_tokens or position + 1 == context_limit:
            return answer(text, FinishReason.LENGTH)
