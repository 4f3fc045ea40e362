"""The model that simulated workers run: it knows a sequence only through what its KV cache holds.

A slot holds the name of everything up to its position, so a block that is shared by mistake, freed too early, or left
behind by a step that broke off shows in the next token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from moestro.cluster.simulation.oracle import NOT_A_NUMBER, POISON, ROOT, draw, logprobs, read
from moestro.protos.sequences import SampledToken, TokenLogprobs
from moestro.workers.runner import StepResult
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.scheduler_sequence import Span, StepPlan

POISON_AT = 3  # the output position whose computation kills


@dataclass(frozen=True, slots=True)
class Computed:
    """Implements ``Launched``."""

    result: StepResult

    def collect(self) -> StepResult:
        return self.result


class NamedCache:
    """Implements ``StepRunner`` over a cache of names."""

    def __init__(self, config: SchedulerConfig, rng: random.Random) -> None:
        self._size = config.block_size
        self._rng = rng
        self._slots: list[dict[int, int]] = [{} for _ in config.groups]

    @property
    def cache(self) -> None:
        """There are no tensors."""
        return None

    def kills(self, plan: StepPlan) -> bool:
        """Whether computing the plan would end the process."""
        return any(
            POISON in s.token_ids[: s.num_prompt] and start <= s.num_prompt + POISON_AT < start + length
            for s, start, length, _ in plan.spans
        )

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Computed:
        sampled: dict[str, SampledToken] = {}
        prompts: dict[str, tuple[TokenLogprobs, ...]] = {}
        # A span may begin behind what another one writes in this very step; positions ascend along such chains.
        for span in sorted(plan.spans, key=lambda span: span.start):
            sequence, start, length, samples = span
            names = self._compute(span)
            if NOT_A_NUMBER in sequence.token_ids[start : start + length]:
                sampled[sequence.sequence_id] = SampledToken(-1, error="not a number")
                continue
            params = sequence.sampling
            if sequence.wants_prompt_logprobs and params.prompt_logprobs is not None:
                following = sequence.token_ids[start + 1 : min(start + length + 1, sequence.num_prompt)]
                prompts[sequence.sequence_id] = tuple(
                    logprobs(name, token, params.prompt_logprobs) for name, token in zip(names, following, strict=False)
                )
            if samples:
                token = draw(names[-1], params, start + length)
                told = None if params.logprobs is None else logprobs(names[-1], token, params.logprobs)
                sampled[sequence.sequence_id] = SampledToken(token, told)
        return Computed(StepResult(sampled, prompts))

    def spoil(self, plan: StepPlan) -> None:
        """The step broke off in the middle: what it was to write is anything."""
        for span in plan.spans:
            for group in range(len(self._slots)):
                for position in range(span.start, span.start + span.length):
                    if self._rng.random() < 0.9:
                        self._slots[group][self._slot(span, group, position)] = self._rng.getrandbits(60)

    def _compute(self, span: Span) -> Sequence[int]:
        """Writes the span's names into every group's slots; what came before is read from the cache."""
        sequence, start, length, _ = span
        before = (
            {self._slots[g].get(self._slot(span, g, start - 1)) for g in range(len(self._slots))} if start else {ROOT}
        )
        name = before.pop() if len(before) == 1 else None
        names = []
        for position in range(start, start + length):
            # A slot that holds nothing, or groups that disagree: attention would compute nonsense, and so does this.
            name = read(-1 if name is None else name, sequence.token_ids[position])
            names.append(name)
            for group, slots in enumerate(self._slots):
                slots[self._slot(span, group, position)] = name
        return names

    def _slot(self, span: Span, group: int, position: int) -> int:
        block = span.sequence.block_tables[group][position // self._size]
        return block * self._size + position % self._size
