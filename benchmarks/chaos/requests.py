"""What the clients ask while things break: a pure function of a seed and of the model's description."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from moestro.cluster.client_calls import Options
from moestro.cluster.client_results import ModelInfo
from moestro.cluster.verify.suite import TEXTS, Case


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests there are: tokens of prompt and output, from and to, and shares of all requests."""

    prompt: tuple[int, int] = (4, 192)
    output: tuple[int, int] = (16, 160)  # long enough for faults to come in the middle of answers
    cancelled: float = 0.1
    whole: float = 0.1  # asked for without a stream
    kinds: int = 10  # the first so many of those below


class How(Enum):
    STREAM = "stream"
    WHOLE = "whole"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of one client. ``events``: after so many a cancelled one is given up."""

    case: Case
    how: How = How.STREAM
    events: int = 0


_SAMPLED: Options = {"temperature": 0.9, "top_p": 0.95}
_KINDS: tuple[tuple[str, Options], ...] = (
    ("greedy", {"temperature": 0.0, "ignore_eos": True}),
    ("greedy, logprobs", {"temperature": 0.0, "logprobs": 3, "ignore_eos": True}),
    ("top-p", {**_SAMPLED, "logprobs": 1, "ignore_eos": True}),
    ("penalties", {**_SAMPLED, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3,
                   "logprobs": 2}),
    ("n 3", {**_SAMPLED, "n": 3, "logprobs": 1}),
    ("n 2, stop strings", {"temperature": 1.0, "n": 2, "stop": ["return", "\n\n", "):\n"], "ignore_eos": True}),
    ("top-k, min-p", {"temperature": 1.1, "top_k": 40, "min_p": 0.02, "logprobs": 5}),
    ("greedy, stop strings", {"temperature": 0.0, "stop": ["\n\n\n", "raise"], "ignore_eos": True}),
    ("prompt logprobs", {**_SAMPLED, "logprobs": 2, "prompt_logprobs": 2, "ignore_eos": True}),
    ("chat", {**_SAMPLED, "logprobs": 1, "ignore_eos": True}),
)  # fmt: skip


def build_pool(model: ModelInfo, texts: Sequence[Sequence[int]], count: int, seed: int, mix: Mix) -> tuple[Case, ...]:
    """``count`` requests, ``texts`` being ``verify.suite.TEXTS`` as token ids. Every kind comes in its turn."""
    rng = random.Random(f"chaos requests {seed}")
    cases = []
    for number in range(count):
        kind, options = _KINDS[number % mix.kinds]
        prompt: tuple[int, ...] | str
        if kind == "chat" and model.has_chat_template:
            prompt = rng.choice(TEXTS)[: rng.randint(4, 80)]
        else:
            length = rng.randint(mix.prompt[0], min(mix.prompt[1], model.max_context // 4))
            stem = list(rng.choice(texts))[: rng.randint(1, length)]
            prompt = (*stem, *(rng.randrange(model.vocab_size) for _ in range(length - len(stem))))
        longest = min(mix.output[1], model.max_context // 4)
        asked: Options = {
            **options,
            "seed": rng.getrandbits(64),
            "max_tokens": rng.randint(min(mix.output[0], longest), longest),
        }
        cases.append(Case(f"{number} ({kind})", prompt, asked))
    return tuple(cases)


def turns(pool: Sequence[Case], seed: int, client: int, mix: Mix) -> Iterator[Turn]:
    """What one client asks, without end."""
    rng = random.Random(f"chaos client {client} {seed}")
    while True:
        case, chance = rng.choice(pool), rng.random()
        events = rng.randint(1, mix.output[1] // 4)
        if chance < mix.cancelled:
            yield Turn(case, How.CANCEL, events)
        elif chance < mix.cancelled + mix.whole and not isinstance(case.prompt, str):  # a chat is always streamed
            yield Turn(case, How.WHOLE)
        else:
            yield Turn(case)
