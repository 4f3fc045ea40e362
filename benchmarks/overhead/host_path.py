"""What one decode step costs the host, part by part: the real engine around a model that costs nothing.

Legend: T tokens of the step, R rows of logits, V vocabulary, M model width.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from time import thread_time_ns

import torch
from benchmarks.overhead.load import BLOCK_SIZE, PROMPT_TOKENS, TOKEN, config, fill, request
from torch import Tensor

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta
from moestro.workers.batch import Batch
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.runner import Runner
from moestro.workers.scheduler import Scheduler

VOCABULARY = 256  # small: the argmax over a real vocabulary is work of the model's head, not of the host's
WIDTH = 512
PARTS = ("plan", "build", "sample", "apply", "encode")


@dataclass(slots=True)
class FixedModel:
    """Returns the same logits in every step, and notes when it was entered and left (ns of the thread's CPU time)."""

    logits_RV: Tensor
    x_TM: Tensor
    entered_ns: int = 0
    left_ns: int = 0

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        self.entered_ns = thread_time_ns()
        rows = batch.logit_rows_R.shape[0]
        batch.health.saw_result(self.x_TM[: batch.num_tokens])
        self.left_ns = thread_time_ns()
        return self.logits_RV[:rows]


@dataclass(slots=True)
class Stamp:
    """A clock that notes when it was read: between the runner's work and the scheduler's ``apply``."""

    read_ns: int = 0

    def __call__(self) -> float:
        self.read_ns = thread_time_ns()
        return 0.0


@dataclass(slots=True)
class Times:
    """Microseconds of each part in each step."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def note(self, *stamps_ns: int) -> None:
        """The ends of the parts, after the start of the first one."""
        for part, (start, end) in zip(PARTS, pairwise(stamps_ns), strict=True):
            self.parts[part].append((end - start) / 1e3)

    def medians(self) -> dict[str, float]:
        """Of each part, and of the whole step (not the sum of medians)."""
        whole = [sum(step) for step in zip(*self.parts.values(), strict=True)]
        return {part: statistics.median(times) for part, times in self.parts.items()} | {
            "step": statistics.median(whole)
        }


def host_round(num_running: int, steps: int, context: int = PROMPT_TOKENS) -> dict[str, float]:
    """Median microseconds of the parts of a step in which ``num_running`` sequences of some ``context`` tokens decode.

    plan: the scheduler's. build: the batch's tensors. sample: greedy rows, the check for what is not a number, and what
    the scheduler is told. apply: the scheduler's, deltas included. encode: the message of the step, as bytes.
    """
    torch.manual_seed(0)
    scheduler = Scheduler(config(num_running, context + 2 * BLOCK_SIZE + steps))
    fill(scheduler, num_running, context)
    model = FixedModel(torch.randn(num_running, VOCABULARY), torch.randn(num_running, WIDTH).bfloat16())
    runner = Runner(model, KVCache((), BLOCK_SIZE), torch.device("cpu"))
    engine = Engine(scheduler, runner, EngineLimits(VOCABULARY, scheduler.context_limit, 1))
    clock, times = Stamp(), Times()
    gc.collect()
    for _ in range(steps):
        start = thread_time_ns()
        plan = engine.plan(0.0)
        planned = thread_time_ns()
        deltas = engine.run(plan, (num_running,), clock)
        applied = thread_time_ns()
        _encoded(deltas, engine.load())
        encoded = thread_time_ns()
        # The model takes a stamp when it is entered and another when it is left; what lies between is nobody's.
        gap = model.left_ns - model.entered_ns
        times.note(start, planned, model.entered_ns, clock.read_ns - gap, applied - gap, encoded - gap)
    return times.medians()


def scheduler_round(num_running: int, steps: int, *, spare_blocks: int = 0, num_waiting: int = 0) -> dict[str, float]:
    """Median microseconds of ``plan``, ``apply`` and both (``step``), nothing else between them: what vLLM's scheduler
    is measured by. ``num_waiting`` more wait and find no slot; ``spare_blocks`` more are in the pool."""
    context = PROMPT_TOKENS + 2 * BLOCK_SIZE + steps
    scheduler = Scheduler(config(num_running, context, spare_blocks=spare_blocks, num_waiting=num_waiting))
    fill(scheduler, num_running)
    for number in range(num_running, num_running + num_waiting):
        scheduler.add(request(number, PROMPT_TOKENS), 0.0)
    sampled = {str(number): TOKEN for number in range(num_running)}
    plans, applies = [], []
    gc.collect()
    for _ in range(steps):
        start = thread_time_ns()
        plan = scheduler.plan(0.0)
        planned = thread_time_ns()
        scheduler.apply(plan, sampled, 0.0)
        applied = thread_time_ns()
        plans.append((planned - start) / 1e3)
        applies.append((applied - planned) / 1e3)
    both = [p + a for p, a in zip(plans, applies, strict=True)]
    return {name: statistics.median(times) for name, times in (("plan", plans), ("apply", applies), ("step", both))}


def _encoded(deltas: list[SequenceDelta], load: EngineLoad) -> bytes:
    """As ``RankServer`` does for one gateway."""
    message = pb.AttachResponse()
    for delta in deltas:
        wire.write_delta(delta, message.step.deltas.add())
    message.step.load.CopyFrom(wire.encode_load(load))
    return message.SerializeToString()
