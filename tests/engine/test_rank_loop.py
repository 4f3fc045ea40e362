"""A loop whose group breaks at any moment, again and again: nothing that was sent is lost and nothing is said twice.

The model is the scheduler tests' own: keys and values are names of what they depend on, so a slot that a broken step
left half written would show.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from tests.scheduler.test_simulation import (
    CacheModel,
    expected_output,
    next_token,
    random_config,
    random_request,
    random_stems,
)

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, FinishReason, SampledToken, SequenceRequest
from moestro.router.collectives import GroupBroken
from moestro.workers.engine import Engine
from moestro.workers.lockstep import NOTHING, Note, StepAgreement
from moestro.workers.rank_loop import Account, Inbox, Outbox, RankLoop, StepOutput
from moestro.workers.rebalancing.group_experts import NoExperts
from moestro.workers.runner import StepResult
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_sequence import StepPlan
from moestro.workers.watched_runner import WatchedRunner


class Fate:
    """When the group breaks."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.is_on, self.num_breaks = rng, True, 0

    def may_strike(self) -> None:
        if self.is_on and self.rng.random() < 0.08:
            self.num_breaks += 1
            raise GroupBroken("a peer is gone")


@dataclass
class BreakingLockstep:
    """A group of one that may break wherever ranks meet. It stops when nobody has anything left to do."""

    fate: Fate
    inbox: Inbox
    scheduler: Scheduler
    arrivals: list[bytes]
    step: int = 0

    def begin(self, inbox: list[bytes], now: float) -> tuple[list[bytes], float]:
        self.fate.may_strike()
        return inbox, now

    def agree(self, num_tokens: int, note: Note = NOTHING) -> StepAgreement:
        self.fate.may_strike()
        self.step += 1
        for _ in range(self.fate.rng.choice((0, 0, 1, 2))):
            if self.arrivals:
                self.inbox.put(self.arrivals.pop(0))
        stops = not (self.arrivals or self.inbox._messages or self.scheduler.sequence_ids)
        return StepAgreement(self.step, (num_tokens,), (stops,), (note,))

    def sleep(self) -> None:
        self.fate.may_strike()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a loop has no business with {name}")


@dataclass(frozen=True)
class Computed:
    runner: BreakingRunner
    plan: StepPlan

    def collect(self) -> StepResult:
        cache, rng = self.runner.cache_model, self.runner.fate.rng
        try:
            self.runner.fate.may_strike()
        except GroupBroken:
            for span in self.plan.spans:  # a part of what it was to write, and wrong
                for group, slots in enumerate(cache.slots):
                    for position in range(span.start, span.start + rng.randint(0, span.length)):
                        size = cache.config.block_size
                        slots[span.sequence.block_tables[group][position // size], position % size] = -1
            raise
        cache.run(self.plan)
        sampled = {s.sequence.sequence_id: next_token(list(s.sequence.token_ids)) for s in self.plan.spans if s.samples}
        return StepResult({name: SampledToken(token) for name, token in sampled.items()})


@dataclass(frozen=True)
class BreakingRunner:
    fate: Fate
    cache_model: CacheModel

    @property
    def cache(self) -> Any:
        raise AssertionError("a loop has no business with the cache")

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Computed:
        return Computed(self, plan)


@dataclass
class Heard:
    """What is published."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, FinishReason] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def publish(self, output: StepOutput) -> None:
        self.refused += [name for name, _ in output.refusals]
        for delta in output.deltas:
            assert delta.sequence_id not in self.ended, f"{delta.sequence_id} was told after its end"
            self.tokens[delta.sequence_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ended[delta.sequence_id] = delta.finish_reason


@pytest.mark.parametrize("seed", range(60))
def test_every_stream_outlives_groups_that_break(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng, max_waiting=100)
    scheduler, fate, heard, inbox, account = Scheduler(config), Fate(rng), Heard(), Inbox(), Account()
    stems = random_stems(rng)
    requests = {f"{n}": random_request(rng, f"{n}", stems) for n in range(12)}
    cancelled = set(rng.sample(sorted(requests), 3))
    arrivals = [message for name, request in requests.items() for message in messages(request, name in cancelled)]
    runner = BreakingRunner(fate, CacheModel(config))
    engine = Engine(scheduler, runner, EngineLimits(5, scheduler.context_limit, 100))
    outbox = Outbox(heard.publish)
    for _ in range(400):
        lockstep = BreakingLockstep(fate, inbox, scheduler, arrivals)
        loop = RankLoop(engine, cast(Any, lockstep), NoExperts("a test"), inbox, outbox, account, lambda: 0.0)
        try:
            loop.run()
            break
        except GroupBroken:
            scheduler.check_integrity()
            fate.is_on = fate.num_breaks < 40
    assert not arrivals + inbox.take(), f"seed {seed}: not all was heard"
    assert heard.ended.keys() | set(heard.refused) == requests.keys(), f"seed {seed}: who was never told the end"
    for name, reason in heard.ended.items():
        tokens, expected_reason = expected_output(requests[name], scheduler.context_limit)
        said = heard.tokens[name]
        if name in cancelled and reason is FinishReason.CANCELLED:
            assert said == tokens[: len(said)], f"seed {seed}: {name}"
        else:
            assert (said, reason) == (tokens, expected_reason), f"seed {seed}: {name}"
    assert scheduler.load().kv_blocks_used == 0, f"seed {seed}: blocks leak"
    assert account.turns > account.applied > 0


def messages(request: SequenceRequest, is_cancelled: bool) -> list[bytes]:
    sent = [pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString()]
    return sent + [pb.AttachRequest(cancel=request.sequence_id).SerializeToString()] * is_cancelled


def test_a_step_is_not_believed_when_the_group_fell_meanwhile() -> None:
    def fallen() -> None:
        raise GroupBroken("this process group is closed")

    config = random_config(random.Random(0))
    fate = Fate(random.Random(0))
    fate.is_on = False
    runner = WatchedRunner(BreakingRunner(fate, CacheModel(config)), fallen)
    launched = runner.launch(StepPlan((), 0, 0, 0.0), (0,))
    with pytest.raises(GroupBroken, match="closed"):
        launched.collect()
