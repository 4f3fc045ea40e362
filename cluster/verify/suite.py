"""The requests that are asked again and again: a pure function of a seed and of the model's description."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moestro.cluster.client_calls import Options
from moestro.cluster.client_results import ModelInfo

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog, which had been asleep since noon, opens one eye, thinks "
    "about it for as long as a dog thinks about anything, and goes back to sleep. Nobody wrote down what the fox said.",
    "def merge(left, right):\n    out = []\n    while left and right:\n        out.append(left.pop(0) if left[0] <= "
    "right[0] else right.pop(0))\n    return out + left + right\n\n\nassert merge([1, 4], [2, 3]) == [1, 2, 3, 4]\n",
    "Il était une fois 3 petits cochons; 三只小猪盖房子, и каждый строил по-своему: straw, sticks, bricks. "
    '{"a": [1, 2.5e-3], "b": null}',
)
"""Natural prompts, of which beginnings are used; tokenised by the server."""

MAX_PROMPT = 400  # tokens; more than one chunk of attention, and computed token by token in seconds
MAX_OUTPUT = 24


@dataclass(frozen=True, slots=True)
class Case:
    """One request of the suite. ``prompt`` is token ids, or what a user says to a chat."""

    name: str
    prompt: tuple[int, ...] | str
    options: Options

    def without_prompt_logprobs(self) -> Case:
        """The same, free to find its prefix in the cache."""
        kept: Options = {**self.options}
        kept.pop("prompt_logprobs", None)
        return replace(self, options=kept)


_SAMPLED: Options = {"temperature": 0.9, "top_p": 0.95}
# All but the last two of these ask for prompt logprobs: such a request computes every position of its prompt, whatever
# is in the cache, so it is really disturbed each time. The last two find what they can.
_KINDS: tuple[tuple[str, Options], ...] = (
    ("greedy", {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2}),
    ("top-p", {**_SAMPLED, "logprobs": 1, "prompt_logprobs": 0}),
    ("penalties", {**_SAMPLED, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3,
                   "logprobs": 2, "prompt_logprobs": 1}),
    ("n 3", {**_SAMPLED, "n": 3, "logprobs": 1, "prompt_logprobs": 0}),
    ("top-k, min-p", {"temperature": 1.1, "top_k": 40, "min_p": 0.02, "logprobs": 5, "prompt_logprobs": 5}),
    ("chat", {**_SAMPLED, "logprobs": 1, "prompt_logprobs": 0}),
    ("greedy, cached", {"temperature": 0.0, "logprobs": 3}),
    ("n 2, cached", {**_SAMPLED, "n": 2}),
)  # fmt: skip


def build_suite(model: ModelInfo, texts: Sequence[Sequence[int]], count: int, seed: int) -> tuple[Case, ...]:
    """``count`` requests, ``texts`` being TEXTS as token ids. Prompts begin with one of a few stems, so many share
    prefixes; their lengths are spread evenly over the orders of magnitude, and every eighth is as long as can be."""
    rng = random.Random(f"verify {seed}")
    longest = max(1, min(MAX_PROMPT, model.max_context // 2))
    stems = [list(text) for text in texts if text] + [_random_ids(rng, model, longest) for _ in range(2)]
    cases = []
    for number in range(count):
        kind, options = _KINDS[number % len(_KINDS)]
        chats = kind == "chat"
        if chats and not model.has_chat_template:
            kind = "top-p"
        length = longest if number % len(_KINDS) == 0 else round(math.exp(rng.uniform(0.0, math.log(longest))))
        stem = rng.choice(stems)[:length]
        ids = (*stem, *_random_ids(rng, model, length - len(stem)))
        said = rng.choice(TEXTS)
        prompt = said[: rng.randint(4, 60)] if chats and model.has_chat_template else ids
        asked: Options = {
            **options,
            "seed": rng.getrandbits(64),
            "max_tokens": min(rng.randint(8, MAX_OUTPUT), max(1, model.max_context // 4)),
        }
        cases.append(Case(f"{number} ({kind})", prompt, asked))
    return tuple(cases)


def filler(model: ModelInfo, rng: random.Random) -> Case:
    """A request that is only there to be in the way."""
    length = rng.randint(1, max(1, min(MAX_PROMPT, model.max_context // 2)))
    options: Options = {
        "temperature": 1.0,
        "seed": rng.getrandbits(64),
        "max_tokens": min(rng.randint(1, 2 * MAX_OUTPUT), max(1, model.max_context // 4)),
        "ignore_eos": True,
    }
    return Case("filler", tuple(_random_ids(rng, model, length)), options)


def _random_ids(rng: random.Random, model: ModelInfo, count: int) -> list[int]:
    return [rng.randrange(model.vocab_size) for _ in range(count)]
