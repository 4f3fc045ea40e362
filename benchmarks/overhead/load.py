"""The synthetic load: N sequences that decode, and nothing else to do.

Prompts have 100 to 115 tokens, so that of sixteen steps each sequence takes a block in one and fills one in another,
but never all in the same. Every sampled token is 7; no sequence ends. ``vllm_worker.py`` makes the same load for its
peer.
"""

from __future__ import annotations

from moestro.protos.sequences import SampledToken, SamplingParams, SequenceRequest
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

BLOCK_SIZE = 16
PROMPT_TOKENS = 100
TOKEN = SampledToken(7)
GREEDY = SamplingParams(temperature=0.0, max_tokens=2**20)


def request(number: int, num_tokens: int) -> SequenceRequest:
    """A prompt that shares no block with another's."""
    return SequenceRequest(str(number), tuple(range(number, number + num_tokens)), GREEDY)


def config(num_running: int, context: int, *, spare_blocks: int = 0, num_waiting: int = 0) -> SchedulerConfig:
    """Room for ``num_running`` sequences of ``context`` tokens, all of whose prompts one step can take."""
    num_blocks = 1 + num_running * (context // BLOCK_SIZE + 2) + spare_blocks
    return SchedulerConfig(
        (CacheGroup(None, num_blocks),),
        BLOCK_SIZE,
        num_running,
        num_running * context,
        context,
        num_running + num_waiting,
    )


def fill(scheduler: Scheduler, num_running: int, prompt_tokens: int = PROMPT_TOKENS) -> None:
    """Adds the sequences and takes their prompts in, in one step."""
    for number in range(num_running):
        scheduler.add(request(number, prompt_tokens + number % BLOCK_SIZE), 0.0)
    step(scheduler)


def step(scheduler: Scheduler) -> None:
    plan = scheduler.plan(0.0)
    scheduler.apply(plan, {span.sequence.sequence_id: TOKEN for span in plan.spans}, 0.0)
