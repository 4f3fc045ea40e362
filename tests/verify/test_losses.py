"""The bundled model, its engine lost again and again: tokens, text, logprobs and endings are the same to the bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from moestro.cluster.backend import DeltaStream
from moestro.cluster.client_calls import Options, chat, stream
from moestro.cluster.config import load_config
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.events import Completion, gather
from moestro.cluster.edge.served import EdgeLimits, RecoveryLimits
from moestro.cluster.gateway import served_model
from moestro.cluster.local_backend import LocalBackend
from moestro.cluster.serving.rank_spec import rank_spec
from moestro.protos.errors import EngineLost
from moestro.protos.sequences import SequenceDelta, SequenceRequest
from moestro.workers.full_group import build_rank

SEEDS = (1, 2)
PROMPT = "def fibonacci(n):\n    "
CASES: dict[str, Options] = {
    "greedy": {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    "sampled": {"temperature": 0.9, "seed": 7, "top_p": 0.95, "n": 3, "logprobs": 0},
    "penalties": {
        "temperature": 0.7,
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "min_tokens": 12,
        "logit_bias": {10: 2.0},
    },
    "stop": {"temperature": 0.0, "stop": ["\n\n", "return n"], "ignore_eos": True},
}


class Losing(LocalBackend):
    """Loses most streams after a few messages; it is there again at once."""

    rng = random.Random(0)
    is_well = True

    def start(self, sequences: Sequence[SequenceRequest]) -> DeltaStream:  # type: ignore[override]
        deltas = super().start(sequences)
        return deltas if self.is_well else LostAfter(deltas, self.rng.randint(0, 6))


class LostAfter:
    def __init__(self, deltas: DeltaStream, messages: int) -> None:
        self._deltas, self._left = deltas, messages
        self.cancel, self.close, self.num_unread = deltas.cancel, deltas.close, deltas.num_unread

    async def next(self) -> list[SequenceDelta]:
        if not self._left:
            raise EngineLost("told so", died=False)
        self._left -= 1
        return await self._deltas.next()


def test_every_kind_of_request_survives_any_losses() -> None:
    async def answer(core: RequestCore, name: str) -> Completion:
        options: Options = {"max_tokens": 24, "request_id": name, **CASES.get(name, {})}
        call = stream(PROMPT, options) if name in CASES else chat("sort a list", options)
        return gather([event async for event in core.stream(call.request)])

    async def test() -> None:
        torch.set_num_threads(1)
        config = load_config(None, {"cluster": {"dp": 1}})
        backend = Losing(build_rank(rank_spec(config)))
        limits = EdgeLimits(recovery=RecoveryLimits(migrations=1000))
        core = RequestCore([served_model(config, backend)], limits)
        names = [*CASES, *(["chat"] if core.find("").text.has_chat_template else [])]
        try:
            expected = [await answer(core, name) for name in names]
            for seed in SEEDS:
                backend.is_well, backend.rng = False, random.Random(seed)
                answers = await asyncio.gather(*(answer(core, name) for name in names))
                assert [replace(a, usage=b.usage) for a, b in zip(answers, expected, strict=True)] == expected, seed
                assert sum(each.usage.migrations for each in answers) >= len(names), seed
                assert [a.usage.output_tokens for a in answers] == [b.usage.output_tokens for b in expected], seed
        finally:
            core.close()
            await backend.close()

    asyncio.run(asyncio.wait_for(test(), 120))
