"""transformers' generate with ``grouped_mm`` experts: first come, first served, static batches of equal shapes.

Requests of other lengths wait for the running batch to end, as generate has no continuous batching. A stopping
criterion that never stops says when each token came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.peers.engines.port import Emit, Settings
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    prompt: Sequence[int]
    num_output: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.prompt), self.num_output


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Emits the last token of every row."""

    def __init__(self, numbers: Sequence[int], emit: Emit) -> None:
        self._numbers, self._emit = numbers, emit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids[:, -1].tolist()
        self._emit({number: [token] for number, token in zip(self._numbers, tokens, strict=True)})
        return torch.zeros(len(tokens), dtype=torch.bool)


class TransformersGenerate:
    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        self._waiting: deque[Request] = deque()

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        self._waiting.append(Request(number, prompt, num_output))

    def step(self, emit: Emit) -> None:
        batch = [self._waiting.popleft()]
        while self._waiting and self._waiting[0].shape == batch[0].shape:
            batch.append(self._waiting.popleft())
        prompts = torch.tensor([request.prompt for request in batch])
        with torch.inference_mode():
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=batch[0].num_output,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Watch([request.number for request in batch], emit)]),
            )
