"""What a step may not look at: counted, not timed."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import SampledToken, SamplingParams, SequenceRequest
from moestro.workers.kv_blocks import BlockPool
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

BLOCK_SIZE = 16
PROMPT = BLOCK_SIZE + 2  # the step that takes it in ends two tokens after the start of a block
GREEDY = SamplingParams(temperature=0.0, max_tokens=1000)


def decoding(num_running: int, num_waiting: int = 0, window: int | None = None, num_blocks: int = 4096) -> Scheduler:
    """All prompts are in; the others wait for a slot."""
    group, num_sequences = CacheGroup(window, num_blocks), num_running + num_waiting
    config = SchedulerConfig((group,), BLOCK_SIZE, num_running, num_running * PROMPT, 4096, num_sequences)
    scheduler = Scheduler(config)
    for number in range(num_running + num_waiting):
        scheduler.add(SequenceRequest(str(number), tuple(range(number, number + PROMPT)), GREEDY), 0.0)
    step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> None:
    plan = scheduler.plan(0.0)
    scheduler.apply(plan, {span.sequence.sequence_id: SampledToken(7) for span in plan.spans}, 0.0)


def calls(work: Callable[[], object]) -> Counter[str]:
    """Every call of a Python function or a builtin, by name."""
    seen: Counter[str] = Counter()

    def note(frame: object, event: str, argument: object) -> None:
        if event == "call":
            seen[frame.f_code.co_qualname] += 1  # type: ignore[attr-defined]
        elif event == "c_call":
            seen[argument.__qualname__] += 1  # type: ignore[attr-defined]

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("window", [None, 128])
def test_within_a_block_a_step_asks_neither_tables_nor_pools(window: int | None) -> None:
    scheduler = decoding(50, window=window)
    for _ in range(BLOCK_SIZE - 3):
        seen = calls(lambda: step(scheduler))
        seen.pop("TableManager.trim", None)  # looks at the border of the window, and frees nothing here
        assert not [name for name in seen if name.startswith(("TableManager", "BlockPool", "Scheduler._serve"))]
    seen = calls(lambda: step(scheduler))  # this one fills each sequence's block
    assert seen["Scheduler._serve"] == 50


def test_those_who_wait_cost_a_step_nothing() -> None:
    """Only the first of them is looked at."""
    one, many = decoding(8, num_waiting=1), decoding(8, num_waiting=3000)
    assert calls(lambda: step(one)) == calls(lambda: step(many))


def test_calls_grow_with_the_running_sequences_alone() -> None:
    """Twice the sequences: twice the calls, of every kind. Over a whole block, so that each starts and fills one."""

    def block(num_running: int) -> Counter[str]:
        scheduler = decoding(num_running)
        return calls(lambda: [step(scheduler) for _ in range(BLOCK_SIZE)])

    small, large, double = block(50), block(100), block(200)
    assert small.keys() == double.keys()
    for name in small:
        assert double[name] - large[name] == 2 * (large[name] - small[name]), name


def test_a_larger_pool_costs_no_more_calls() -> None:
    def block(num_blocks: int) -> Counter[str]:
        scheduler = decoding(20, num_blocks=num_blocks)
        return calls(lambda: [step(scheduler) for _ in range(BLOCK_SIZE)])

    assert block(256) == block(200_000)


def test_a_pool_takes_few_bytes_for_a_block_never_used() -> None:
    tracemalloc.start()
    try:
        pool = BlockPool(100_000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= 13 * 100_000
    assert [pool.allocate() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("num_tokens", [100, 1000])
def test_a_waiting_request_takes_four_bytes_a_token(num_tokens: int) -> None:
    """As it comes from the wire, with token ids that Python does not share."""
    prompts = [tuple(range(1000 + n, 1000 + n + num_tokens)) for n in range(201)]
    messages = [
        wire.encode_request(SequenceRequest(str(n), prompt, GREEDY)).SerializeToString()
        for n, prompt in enumerate(prompts, start=1)
    ]
    scheduler = decoding(1)
    scheduler.config = replace(scheduler.config, max_waiting=len(messages))

    def take_in(message: bytes) -> None:
        scheduler.add(wire.decode_request(pb.Sequence.FromString(message)), 0.0)

    take_in(messages[0])  # whatever is made once is made by now
    tracemalloc.start()
    try:
        for message in messages[1:]:
            take_in(message)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / (len(messages) - 1) <= 4 * num_tokens + 2000
