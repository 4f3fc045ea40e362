"""The engine as a rank builds it (Scheduler, Runner, cache), with models that watch themselves.

Built here and not by ``workers.rank_setup``, which also needs the protobuf runtime that this suite does without.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moestro.protos.sequences import EngineLimits, SamplingParams, SequenceRequest
from moestro.router.parallel import GroupShape
from moestro.workers.batch import Batch
from moestro.workers.captured.graph import Called
from moestro.workers.captured.runner import CapturedRunner
from moestro.workers.captured.setup import SPARE_BLOCKS, step_runner
from moestro.workers.captured.sizes import graph_sizes
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Model, Runner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig
from moestro.workers.scheduler_sequence import StepPlan


def make_engine(
    decoder: Decoder,
    *,
    max_num_sequences: int,
    max_num_tokens: int,
    max_context: int,
    block_size: int = 16,
    model: Model | None = None,
    graphs: int = 0,
) -> Engine:
    """An engine with room for ``max_num_sequences`` whole contexts. ``model`` runs in the decoder's place. Steps of up
    to ``graphs`` decodes are captured, on a CPU with the stand-in."""
    spec = decoder.cache_spec
    num_blocks = max_num_sequences * -(-max_context // block_size) + 1
    config = SchedulerConfig(
        groups=tuple(CacheGroup(window, num_blocks) for window in spec.windows),
        block_size=block_size,
        max_num_sequences=max_num_sequences,
        max_num_tokens=max_num_tokens,
        max_context=max_context,
    )
    scheduler = Scheduler(config)
    limits = EngineLimits(decoder.config.vocab_size, scheduler.context_limit, config.max_waiting)
    runner = Runner(model or decoder, spec.allocate(num_blocks + SPARE_BLOCKS, block_size), spec.device)
    return capturing(Engine(scheduler, runner, limits), decoder, graphs)


def capturing(engine: Engine, decoder: Decoder, graphs: int) -> Engine:
    """The same scheduler, cache and eager model, with captured steps of up to ``graphs`` decodes of ``decoder``."""
    eager = eager_of(engine)
    num_columns = -(-engine.scheduler.context_limit // eager.cache.block_size)
    capture = None if eager.device.type == "cuda" else Called
    sizes = graph_sizes(graphs, GroupShape())
    return replace(engine, runner=step_runner(eager, decoder, sizes, num_columns, GroupShape(), capture))


def eager_of(engine: Engine) -> Runner:
    """The runner that computes eagerly: the engine's own, or the one behind its graphs."""
    runner: Any = engine.runner
    return runner.eager if isinstance(runner, CapturedRunner) else runner


def with_model(engine: Engine, model: Model) -> Engine:
    """The same engine, sequences and cache, computing every step eagerly with another model."""
    return replace(engine, runner=replace(eager_of(engine), model=model))


def with_eager_model(engine: Engine, model: Model) -> Engine:
    """The same engine, its graphs included, with another model for the steps that are not captured."""
    runner: Any = copy(engine.runner)
    if not isinstance(runner, CapturedRunner):
        return with_model(engine, model)
    runner.eager = replace(runner.eager, model=model)
    return replace(engine, runner=runner)


@dataclass(slots=True)
class Recorder:
    """A model that keeps the last step's batch and logits."""

    model: Model
    batch: Batch | None = None
    logits_RV: Tensor | None = None

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        self.batch, self.logits_RV = batch, self.model.forward(batch, cache)
        return self.logits_RV

    def rows(self, plan: StepPlan) -> Iterable[tuple[str, int, Tensor]]:
        """(sequence id, position, logits_V) of every row of the step that ``plan`` was."""
        assert self.batch is not None
        assert self.logits_RV is not None
        starts = self.batch.query_start_S1
        where = [
            (span.sequence.sequence_id, span.start + offset) for span in plan.spans for offset in range(span.length)
        ]
        assert len(where) == starts[-1]
        for row, token in enumerate(self.batch.logit_rows_R.tolist()):
            yield *where[token], self.logits_RV[row]


def _rows(engine: Engine, recorder: Recorder, plan: StepPlan) -> Iterable[tuple[str, int, Tensor]]:
    """As ``Recorder.rows``, also of a step that was replayed."""
    if recorder.batch is not None:
        return recorder.rows(plan)
    runner: Any = engine.runner
    logits_RV = runner.outputs.logits_RV[: len(plan.spans)].clone()
    return [(span.sequence.sequence_id, span.start, row_V) for span, row_V in zip(plan.spans, logits_RV, strict=True)]


@dataclass(slots=True)
class Transcript:
    """All tokens of one sequence and the logits of every position but the last."""

    ids: list[int]
    num_prompt: int
    logits: dict[int, Tensor] = field(default_factory=dict)

    def logits_TV(self) -> Tensor:
        """fp32, on the CPU. Raises KeyError for a position that no step computed."""
        return torch.stack([self.logits[position] for position in range(len(self.ids) - 1)]).float().cpu()


def follow(engine: Engine, prompts: list[list[int]], num_output: int) -> list[Transcript]:
    """Runs greedy requests to their ends, all added at once, and keeps every position's logits."""
    recorder = Recorder(eager_of(engine).model)
    watched = with_eager_model(engine, recorder)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True, prompt_logprobs=0)
    transcripts = {str(index): Transcript(list(prompt), len(prompt)) for index, prompt in enumerate(prompts)}
    for name, transcript in transcripts.items():
        refusal = watched.add(SequenceRequest(name, tuple(transcript.ids), sampling), time.monotonic())
        if refusal is not None:
            raise RuntimeError(refusal)
    while watched.has_work:
        plan = watched.plan(time.monotonic())
        recorder.batch = None
        deltas = watched.run(plan, (plan.num_tokens,), time.monotonic)
        for name, position, logits_V in _rows(watched, recorder, plan):
            transcripts[name].logits[position] = logits_V
        for delta in deltas:
            if delta.error:
                raise RuntimeError(f"sequence {delta.sequence_id}: {delta.error}")
            transcripts[delta.sequence_id].ids.extend(delta.token_ids)
    return list(transcripts.values())
