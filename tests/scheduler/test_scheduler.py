"""What the transcripts cannot say: contracts between calls, bounds of the configuration, times."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from moestro.protos.errors import ContextOverflow, InvalidRequest, Overloaded
from moestro.protos.sequences import (
    EngineLoad,
    FinishReason,
    SampledToken,
    SamplingParams,
    SequenceRequest,
    TokenLogprobs,
)
from moestro.workers.kv_blocks import BlockPool
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

CONFIG = SchedulerConfig((CacheGroup(None, 9),), block_size=4, max_num_sequences=4, max_num_tokens=16, max_context=64)


def request(name: str, num_prompt: int = 3, **sampling: Any) -> SequenceRequest:
    return SequenceRequest(name, tuple(range(num_prompt)), SamplingParams(**sampling))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 0, "block_size must be at least 1, not 0"),
        ("max_num_sequences", 0, "max_num_sequences must be at least 1, not 0"),
        ("max_num_tokens", 3, r"max_num_tokens must be at least max_num_sequences \(4\), not 3"),
        ("max_context", 1, "max_context must be at least 2, not 1"),
        ("max_waiting", 0, "max_waiting must be at least 1, not 0"),
        ("groups", (), "groups must name at least one"),
        ("groups", (CacheGroup(None, 1),), r"groups\[0\].num_blocks must be at least 2, not 1"),
        ("groups", (CacheGroup(None, 9), CacheGroup(0, 9)), r"groups\[1\].window must be at least 1, not 0"),
        ("admission", "later", "admission must be 'continuous' or 'static', not 'later'"),
        ("reservation", "none", "reservation must be 'paged' or 'max_length', not 'none'"),
    ],
)
def test_a_bad_configuration_names_field_bound_and_value(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(replace(CONFIG, **{field: value}))  # type: ignore[arg-type]


def test_pools_must_be_those_of_the_groups() -> None:
    with pytest.raises(ValueError, match="pools must have the num_blocks of groups"):
        Scheduler(CONFIG, [BlockPool(8)])


@pytest.mark.parametrize(
    ("groups", "limit"),
    [
        ((CacheGroup(None, 100),), 64),  # max_context
        ((CacheGroup(None, 9),), 32),  # eight blocks of four
        ((CacheGroup(None, 9), CacheGroup(None, 5)), 16),  # the smallest pool
        ((CacheGroup(6, 4),), 64),  # six positions touch at most three blocks: any length passes
        ((CacheGroup(6, 3),), 8),  # two blocks cannot carry the window
    ],
)
def test_the_context_is_what_every_pool_can_hold(groups: tuple[CacheGroup, ...], limit: int) -> None:
    scheduler = Scheduler(replace(CONFIG, groups=groups))
    assert scheduler.context_limit == limit
    assert scheduler.check(request("longest", limit - 1)) is None
    assert f"context of {limit}, not hold {limit}" in (scheduler.check(request("longer", limit)) or "")
    scheduler.add(request("a", limit - 1, max_tokens=2**31), 0.0)  # clamped, not refused
    reasons = []
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        deltas = scheduler.apply(plan, {"a": SampledToken(1)} if plan.spans[0].samples else {}, 0.0)
        reasons += [delta.finish_reason for delta in deltas]
    assert reasons == [FinishReason.LENGTH]


def test_refusals_are_of_their_kind_and_change_nothing() -> None:
    scheduler = Scheduler(replace(CONFIG, max_waiting=1))
    with pytest.raises(InvalidRequest, match="prompt_ids: must hold at least 1 token, not 0"):
        scheduler.add(request("empty", 0), 0.0)
    with pytest.raises(ContextOverflow):
        scheduler.add(request("long", 1000), 0.0)
    with pytest.raises(InvalidRequest, match=r"output_ids: must hold fewer than max_tokens \(2\) tokens, not 2"):
        scheduler.add(replace(request("done", max_tokens=2), output_ids=(1, 2)), 0.0)
    assert not scheduler.has_work
    scheduler.add(request("a"), 0.0)
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(request("a"), 0.0)
    with pytest.raises(Overloaded, match="1 sequences wait; max_waiting is 1"):
        scheduler.add(request("b"), 0.0)
    assert scheduler.load() == EngineLoad(num_waiting=1, kv_blocks_total=8)


def test_plan_and_apply_take_turns() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a"), 0.0)
    plan = scheduler.plan(0.0)
    with pytest.raises(RuntimeError, match="neither applied nor abandoned"):
        scheduler.plan(0.0)
    scheduler.apply(plan, {"a": SampledToken(1)}, 0.0)
    for call in (lambda: scheduler.apply(plan, {}, 0.0), lambda: scheduler.abandon(plan)):
        with pytest.raises(RuntimeError, match="not the one in flight"):
            call()


def test_a_plan_is_frozen() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a"), 0.0)
    plan = scheduler.plan(0.0)
    with pytest.raises(FrozenInstanceError):
        plan.num_tokens = 0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan.spans[0].length = 0  # type: ignore[misc]
    seen = ([*plan.spans[0].sequence.token_ids], [*plan.spans[0].sequence.block_tables[0]])
    scheduler.add(request("b"), 0.0)
    scheduler.cancel("a")
    assert seen == ([*plan.spans[0].sequence.token_ids], [*plan.spans[0].sequence.block_tables[0]])


def test_a_step_that_gives_no_token_ends_that_sequence_alone() -> None:
    scheduler = Scheduler(CONFIG)
    for name in ("a", "b"):
        scheduler.add(request(name), 0.0)
    deltas = {d.sequence_id: d for d in scheduler.apply(scheduler.plan(0.0), {"b": SampledToken(1)}, 0.0)}
    assert (deltas["a"].finish_reason, deltas["a"].error) == (FinishReason.ERROR, "the step gave no token")
    assert (deltas["b"].finish_reason, deltas["b"].token_ids) == (None, (1,))
    scheduler.check_integrity()


def test_an_error_in_the_middle_of_a_prompt_ends_it() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a", 20), 0.0)
    plan = scheduler.plan(0.0)
    assert not plan.spans[0].samples
    (delta,) = scheduler.apply(plan, {"a": SampledToken(0, error="not finite")}, 0.0)
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "not finite")
    assert not scheduler.has_work
    # What it computed is not offered to the next one with the same prompt.
    scheduler.add(request("b", 20), 0.0)
    assert scheduler.plan(0.0).spans[0].start == 0


def test_the_ledger_adds_up() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a", 20, max_tokens=3), 1.0)
    now, deltas = 3.0, []
    while scheduler.has_work:
        plan = scheduler.plan(now)
        now += 2.0
        deltas += scheduler.apply(plan, {"a": SampledToken(1)} if plan.spans[0].samples else {}, now)
    ledger = deltas[-1].ledger
    assert ledger is not None
    assert (ledger.queued_s, ledger.prefill_s, ledger.decode_s, ledger.num_steps) == (2.0, 4.0, 4.0, 4)
    assert scheduler.load().step_s == 2.0
    assert scheduler.load().num_steps == 4


def test_logprobs_go_with_their_token() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a", logprobs=1), 0.0)
    entry = TokenLogprobs(7, -0.5, ((7, -0.5),))
    (delta,) = scheduler.apply(scheduler.plan(0.0), {"a": SampledToken(7, entry)}, 0.0)
    assert (delta.token_ids, delta.logprobs) == ((7,), (entry,))


@pytest.mark.parametrize(
    ("sampling", "token", "reason"),
    [
        ({"eos_token_ids": (5,)}, 5, FinishReason.EOS),
        ({"eos_token_ids": (5,), "ignore_eos": True}, 5, None),
        ({"eos_token_ids": (5,), "ignore_eos": True, "stop_token_ids": (5,)}, 5, FinishReason.STOP_TOKEN),
        ({"eos_token_ids": (5,), "stop_token_ids": (5,)}, 5, FinishReason.EOS),
        ({"stop_token_ids": (5,), "max_tokens": 1}, 5, FinishReason.STOP_TOKEN),
        ({"stop_token_ids": (5,), "max_tokens": 1}, 6, FinishReason.LENGTH),
        ({"stop_token_ids": (5,), "min_tokens": 1}, 5, None),
        ({"stop_token_ids": (5,), "min_tokens": 1, "max_tokens": 1}, 5, FinishReason.LENGTH),
    ],
)
def test_what_ends_a_sequence(sampling: dict[str, Any], token: int, reason: FinishReason | None) -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a", **sampling), 0.0)
    (delta,) = scheduler.apply(scheduler.plan(0.0), {"a": SampledToken(token)}, 0.0)
    assert (delta.token_ids, delta.finish_reason) == ((token,), reason)


def test_a_blocked_queue_neither_loses_nor_reorders_anyone() -> None:
    """The first that waits may need more than is free; those behind it, however small, wait for it."""
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("holder", 13, max_tokens=3), 0.0)
    first = scheduler.plan(0.0)
    scheduler.add(SequenceRequest("large", tuple(range(50, 75)), SamplingParams(max_tokens=1)), 0.0)
    scheduler.add(SequenceRequest("small", (99,), SamplingParams(max_tokens=1)), 0.0)
    scheduler.apply(first, {"holder": SampledToken(1)}, 0.0)
    ended = []
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        sampled = {span.sequence.sequence_id: SampledToken(1) for span in plan.spans if span.samples}
        ended += [d.sequence_id for d in scheduler.apply(plan, sampled, 0.0) if d.finish_reason]
    assert ended.index("holder") < ended.index("large")
    assert set(ended) == {"holder", "large", "small"}
