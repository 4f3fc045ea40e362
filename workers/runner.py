"""A plan becomes a forward pass and samples.

Legend: N ranks of the group, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moestro.protos.sequences import PositionTrace, SampledToken, TokenLogprobs
from moestro.workers.batch import Batch
from moestro.workers.batching import LogitRows, build_batch
from moestro.workers.hidden_trace import HiddenTrace
from moestro.workers.kv_cache import KVCache
from moestro.workers.sampling.logprobs import prompt_logprobs
from moestro.workers.sampling.sampler import NOTHING_DRAWN, SamplingRow, sample_step
from moestro.workers.scheduler_sequence import StepPlan


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """fp32 logits [R, V] of ``batch.logit_rows_R``; shows every layer's result to ``batch.trace``, if there is one.
        Collective in a group, with zero tokens too."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one forward pass says of its sequences, by sequence id."""

    sampled: dict[str, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    traces: dict[str, tuple[PositionTrace, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Runner:
    """Model and cache of one rank. Holds no sequence state: a plan carries all it needs."""

    model: Model
    cache: KVCache
    device: torch.device

    @torch.inference_mode()
    def run(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> StepResult:
        """Computes a plan. ``num_tokens_N`` is what every rank of the group has planned for this step."""
        batch, rows = build_batch(plan, num_tokens_N, self.cache.block_size, self.device)
        logits_RV = self.model.forward(batch, self.cache)
        sampled = _draw(logits_RV, rows)
        sampled.update(_failures(plan, batch))
        return StepResult(sampled, _prompt_logprobs(logits_RV, rows), _traces(plan, batch.trace))


def _draw(logits_RV: Tensor, rows: LogitRows) -> dict[str, SampledToken]:
    special = {
        row: SamplingRow(s.sampling, s.token_ids, s.num_prompt, len(s.token_ids))
        for row, s in enumerate(rows.samples)
        if not s.is_plain
    }
    tokens_R = sample_step(logits_RV[: len(rows.samples)], special)
    return dict(zip([s.sequence_id for s in rows.samples], tokens_R, strict=True))


def _failures(plan: StepPlan, batch: Batch) -> dict[str, SampledToken]:
    """The sequences with a hidden state that is not a number, whether they sample in this step or not."""
    starts = batch.query_start_S1
    spans = {bisect_right(starts, row) - 1 for row in batch.health.bad_rows()}
    return {
        plan.spans[s].sequence.sequence_id: SampledToken(
            NOTHING_DRAWN, error=batch.health.where(starts[s], starts[s + 1])
        )
        for s in sorted(spans)
    }


def _prompt_logprobs(logits_RV: Tensor, rows: LogitRows) -> dict[str, tuple[TokenLogprobs, ...]]:
    found = {}
    first = len(rows.samples)
    for span, count in rows.prompts:
        sequence = span.sequence
        next_ids = sequence.token_ids[span.start + 1 : span.start + 1 + count]
        wanted = sequence.sampling.prompt_logprobs
        assert wanted is not None
        found[sequence.sequence_id] = prompt_logprobs(logits_RV[first : first + count], next_ids, wanted)
        first += count
    return found


def _traces(plan: StepPlan, trace: HiddenTrace | None) -> dict[str, tuple[PositionTrace, ...]]:
    if trace is None:
        return {}
    rows = iter(trace.digests())
    return {
        sequence.sequence_id: tuple(PositionTrace(start + i, next(rows)) for i in range(length))
        for sequence, start, length, _ in plan.spans
        if sequence.is_traced
    }
