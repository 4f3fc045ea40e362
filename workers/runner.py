"""A plan becomes a forward pass and samples.

Legend: N ranks of the group, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from moestro.protos.sequences import PositionTrace, SampledToken, TokenLogprobs
from moestro.workers.batch import Batch
from moestro.workers.batching import LogitRows, build_batch
from moestro.workers.health import StepHealth
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


class Launched(Protocol):
    """A step that was launched."""

    def collect(self) -> StepResult:
        """What came of it, once. Waits for the device."""


class StepRunner(Protocol):
    """What the engine needs: a step in two halves, between which the host is free while a device works."""

    @property
    def cache(self) -> KVCache: ...

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Launched:
        """Starts to compute a plan. ``num_tokens_N`` is what every rank of the group has planned for this step. One
        step is under way at a time: it is collected before the next is launched."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Model and cache of one rank. Holds no sequence state: a plan carries all it needs."""

    model: Model
    cache: KVCache
    device: torch.device

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Launched:
        # On a CPU nobody but the host computes: it begins when it is asked for the result.
        return (_Deferred if self.device.type == "cpu" else _Forwarded)(self, plan, num_tokens_N)

    def run(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> StepResult:
        """Launches and collects."""
        return self.launch(plan, num_tokens_N).collect()


@dataclass(frozen=True, slots=True)
class _Deferred:
    runner: Runner
    plan: StepPlan
    num_tokens_N: tuple[int, ...]

    def collect(self) -> StepResult:
        return _Forwarded(self.runner, self.plan, self.num_tokens_N).collect()


class _Forwarded:
    """The forward pass is launched; what is drawn waits for its logits."""

    @torch.inference_mode()
    def __init__(self, runner: Runner, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> None:
        self._plan = plan
        self._batch, self._rows = build_batch(plan, num_tokens_N, runner.cache.block_size, runner.device)
        self._logits_RV = runner.model.forward(self._batch, runner.cache)

    @torch.inference_mode()
    def collect(self) -> StepResult:
        sampled = draw(self._logits_RV, self._rows)
        prompts, failed = _prompt_logprobs(self._logits_RV, self._rows)
        sampled.update(failed)
        sampled.update(failures(self._plan, self._batch.health.bad_rows(), self._batch.health))
        return StepResult(sampled, prompts, _traces(self._plan, self._batch.trace))


def draw(logits_RV: Tensor, rows: LogitRows) -> dict[str, SampledToken]:
    """The next token of every sequence that samples, from the first rows of the logits. Waits for the device."""
    special = {
        row: SamplingRow(s.sampling, s.token_ids, s.num_prompt, len(s.token_ids))
        for row, s in enumerate(rows.samples)
        if not s.is_plain
    }
    tokens_R = sample_step(logits_RV[: len(rows.samples)], special)
    return dict(zip([s.sequence_id for s in rows.samples], tokens_R, strict=True))


def failures(plan: StepPlan, bad_rows: Sequence[int], health: StepHealth) -> dict[str, SampledToken]:
    """The sequences with a hidden state that is not a number, whether they sample in this step or not."""
    if not bad_rows:
        return {}
    starts = list(accumulate((span.length for span in plan.spans), initial=0))
    spans = {bisect_right(starts, row) - 1 for row in bad_rows}
    return {
        plan.spans[s].sequence.sequence_id: SampledToken(NOTHING_DRAWN, error=health.where(starts[s], starts[s + 1]))
        for s in sorted(spans)
    }


def _prompt_logprobs(
    logits_RV: Tensor, rows: LogitRows
) -> tuple[dict[str, tuple[TokenLogprobs, ...]], dict[str, SampledToken]]:
    """By sequence what is known of its prompt, and which sequences fail of it."""
    found, failed = {}, {}
    first = len(rows.samples)
    for span, count in rows.prompts:
        sequence = span.sequence
        next_ids = sequence.token_ids[span.start + 1 : span.start + 1 + count]
        wanted = sequence.sampling.prompt_logprobs
        assert wanted is not None
        logprobs = prompt_logprobs(logits_RV[first : first + count], next_ids, wanted)
        found[sequence.sequence_id] = logprobs
        first += count
        bad = next((place for place, one in enumerate(logprobs) if math.isnan(one.logprob)), None)
        if bad is not None:
            error = f"the model's logits contain NaN or +Inf at position {span.start + bad} of the prompt"
            failed[sequence.sequence_id] = SampledToken(NOTHING_DRAWN, error=error)
    return found, failed


def _traces(plan: StepPlan, trace: HiddenTrace | None) -> dict[str, tuple[PositionTrace, ...]]:
    if trace is None:
        return {}
    rows = iter(trace.digests())
    return {
        sequence.sequence_id: tuple(PositionTrace(start + i, next(rows)) for i in range(length))
        for sequence, start, length, _ in plan.spans
        if sequence.is_traced
    }
