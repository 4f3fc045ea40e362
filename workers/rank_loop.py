"""The loop of one rank: commands in, steps in lockstep with the group, results out.

Every rank of a group runs this loop. Data-parallel ranks have work of their own and step along when they have none;
tensor-parallel peers are replicas of their leader: they hear its commands and its clock and, being deterministic,
do the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moestro.protos import wire
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLoad, SequenceDelta
from moestro.workers.engine import Clock, Engine
from moestro.workers.lockstep import Lockstep
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one turn of the loop has to say."""

    deltas: list[SequenceDelta]
    refusals: list[tuple[str, str]]  # sequence id and reason; never admitted
    load: EngineLoad


class Outbox:
    """What is still to be published, in order."""

    def __init__(self, publish: Callable[[StepOutput], None]) -> None:
        self._publish = publish
        self._outputs: list[StepOutput] = []

    def put(self, output: StepOutput) -> None:
        """Keeps what says something."""
        if output.deltas or output.refusals:
            self._outputs.append(output)

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


class RankLoop:
    """``submit`` and ``stop`` may be called from any thread; ``run`` owns the thread it is called on."""

    def __init__(self, engine: Engine, lockstep: Lockstep, experts: GroupExperts | NoExperts, clock: Clock) -> None:
        self._engine = engine
        self._lockstep = lockstep
        self._experts = experts
        self._clock = clock
        self._inbox = Inbox()

    def submit(self, message: bytes) -> None:
        """Hands over one serialized AttachRequest (submit or cancel) and wakes the group if it sleeps."""
        self._inbox.put(message)
        self._lockstep.wake()

    def stop(self) -> None:
        """Asks the whole group to end at the head of its next step."""
        self._lockstep.stop()

    def experts(self) -> ExpertsReport:
        """What the group knows of its experts. Thread safe."""
        return self._experts.report()

    def request_placement(self, request: PlacementRequest) -> None:
        """Asks the whole group to move its experts. Thread safe; raises ValueError when it cannot be done."""
        self._experts.request(request)

    def close(self) -> None:
        """Gives up the lockstep's connections, after ``run`` has returned and nobody submits any more."""
        self._experts.close()
        self._lockstep.close()

    def run(self, publish: Callable[[StepOutput], None]) -> None:
        """Steps until the group is asked to stop. ``publish`` is called on this thread and must not block; it hears
        of a step while the next one is computed, or at once when there is none."""
        outbox = Outbox(publish)
        try:
            while self._turn(outbox):
                pass
        finally:
            outbox.flush()

    def _turn(self, outbox: Outbox) -> bool:
        """One round. False when the group stops."""
        engine, lockstep = self._engine, self._lockstep
        messages, now = lockstep.begin(self._inbox.take(), self._clock())
        refusals = self._take_in(messages, now)
        plan = engine.plan(now)
        agreement = lockstep.agree(plan.num_tokens, self._experts.note())
        if agreement.stop:
            return False
        self._experts.turn(agreement)
        if agreement.idle:
            outbox.put(StepOutput(engine.skip(plan, now), refusals, engine.load()))
            outbox.flush()
            lockstep.sleep()
            return True
        started_s = time.perf_counter()
        launched = engine.launch(plan, agreement.tokens_per_rank)
        outbox.flush()  # while the device computes
        deltas = engine.collect(plan, launched, self._clock)
        self._experts.stepped(time.perf_counter() - started_s, plan.num_tokens)
        outbox.put(StepOutput(deltas, refusals, engine.load()))
        return True

    def _take_in(self, messages: list[bytes], now: float) -> list[tuple[str, str]]:
        refusals = []
        for data in messages:
            message = pb.AttachRequest.FromString(data)
            if message.WhichOneof("message") == "cancel":
                self._engine.cancel(message.cancel)
            else:
                reason = self._engine.add(wire.decode_request(message.submit), now)
                if reason is not None:
                    refusals.append((message.submit.sequence_id, reason))
        return refusals
