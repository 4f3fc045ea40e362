"""The loop of one rank through one epoch: commands in, steps in lockstep with the group, results out.

Every rank of a group runs this loop. Data-parallel ranks have work of their own and step along when they have none;
tensor-parallel peers are replicas of their leader: they hear its commands and its clock and, being deterministic,
do the same.

A turn that breaks loses nothing: the messages it took go back to the inbox or are in the engine, its plan is abandoned,
and what the step before had to say is published.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLoad, SequenceDelta
from moestro.router.collectives import GroupBroken
from moestro.workers.engine import Clock, Engine
from moestro.workers.lockstep import Lockstep, StepAgreement
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts
from moestro.workers.scheduler_sequence import StepPlan


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one turn of the loop has to say."""

    deltas: list[SequenceDelta]
    refusals: list[tuple[str, str]]  # sequence id and reason; never admitted
    load: EngineLoad
    lost: Sequence[tuple[str, str]] = ()  # sequence id and reason; given up, to be replayed


class Outbox:
    """What is still to be published, in order."""

    def __init__(self, publish: Callable[[StepOutput], None]) -> None:
        self._publish = publish
        self._outputs: list[StepOutput] = []
        self._slowness = 1.0

    def put(self, output: StepOutput) -> None:
        """Keeps what says something."""
        if output.deltas or output.refusals or output.lost or output.load.slowness != self._slowness:
            self._outputs.append(output)
            self._slowness = output.load.slowness

    def flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            self._publish(output)


class Inbox:
    """Serialized AttachRequests on their way to the engine. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: list[bytes] = []

    def put(self, message: bytes) -> None:
        with self._lock:
            self._messages.append(message)

    def take(self) -> list[bytes]:
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def put_back(self, messages: list[bytes]) -> None:
        """Before all others."""
        with self._lock:
            self._messages[:0] = messages


@dataclass(slots=True)
class Account:
    """What a worker has done over all its epochs. The engine's thread writes, any thread reads.

    A scheduler hears of nothing but turns, so two that are replicas of each other are in the same state when their
    histories agree."""

    turns: int = 0  # plans made
    applied: int = 0  # of them those that were computed, or skipped since nobody had anything to compute
    messages: int = 0  # heard
    turn_since_s: float | None = None  # when the turn that now runs began; None asleep
    _began: tuple[int, int, int, int] = (0, 0, 0, 0)  # epoch, and the three above, when the scheduler was new

    @property
    def history(self) -> tuple[int, int, int, int]:
        """Of the scheduler: the epoch in which it was new, and what was done since."""
        epoch, turns, applied, messages = self._began
        return epoch, self.turns - turns, self.applied - applied, self.messages - messages

    def begin_anew(self, epoch: int) -> None:
        """From here on it is a new scheduler."""
        self._began = epoch, self.turns, self.applied, self.messages


class RankLoop:
    """``run`` owns the thread it is called on."""

    def __init__(
        self,
        engine: Engine,
        lockstep: Lockstep,
        experts: GroupExperts | NoExperts,
        inbox: Inbox,
        outbox: Outbox,
        account: Account,
        clock: Clock = time.monotonic,
    ) -> None:
        self._engine = engine
        self._lockstep = lockstep
        self._experts = experts
        self._inbox = inbox
        self._outbox = outbox
        self._account = account
        self._clock = clock

    def run(self) -> None:
        """Steps until the group is asked to stop. What a step says is published while the next one is computed, or at
        once when there is none; publishing must not block. Raises GroupBroken when the group can do nothing more
        together; the engine can go on in another."""
        try:
            while self._turn():
                pass
        finally:
            self._account.turn_since_s = None
            self._outbox.flush()

    def _turn(self) -> bool:
        """One round. False when the group stops."""
        engine, account = self._engine, self._account
        account.turn_since_s = now = self._clock()
        messages, now = self._begin(now)
        self._take_in(messages, now)
        plan = engine.plan(now)
        account.turns += 1
        try:
            agreement = self._lockstep.agree(plan.num_tokens, self._experts.note())
            if agreement.stop:
                engine.abandon(plan)
                return False
            self._experts.turn(agreement)
            deltas = engine.skip(plan, now) if agreement.idle else self._compute(plan, agreement)
        except Exception:
            engine.abandon(plan)
            raise
        account.applied += 1
        self._outbox.put(StepOutput(deltas, [], self._load()))
        if agreement.idle:
            account.turn_since_s = None
            self._outbox.flush()
            self._lockstep.sleep()
        return True

    def _begin(self, now: float) -> tuple[list[bytes], float]:
        mine = self._inbox.take()
        try:
            return self._lockstep.begin(mine, now)
        except GroupBroken:
            self._inbox.put_back(mine)
            raise

    def _compute(self, plan: StepPlan, agreement: StepAgreement) -> list[SequenceDelta]:
        started_s = time.perf_counter()
        launched = self._engine.launch(plan, agreement.tokens_per_rank)
        self._outbox.flush()  # while the device computes
        deltas = self._engine.collect(plan, launched, self._clock)
        self._experts.stepped(time.perf_counter() - started_s, plan.num_tokens, self._engine.load().kv_blocks_used)
        return deltas

    def _take_in(self, messages: list[bytes], now: float) -> None:
        refusals = []
        for data in messages:
            message = pb.AttachRequest.FromString(data)
            if message.WhichOneof("message") == "cancel":
                self._engine.cancel(message.cancel)
            else:
                reason = self._engine.add(wire.decode_request(message.submit), now)
                if reason is not None:
                    refusals.append((message.submit.sequence_id, reason))
        self._account.messages += len(messages)
        if refusals:
            self._outbox.put(StepOutput([], refusals, self._load()))

    def _load(self) -> EngineLoad:
        return replace(self._engine.load(), slowness=self._experts.slowness)
