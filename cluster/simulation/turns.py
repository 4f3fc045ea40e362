"""The engine of a simulated worker, turn by turn: ``RankLoop`` written over awaits, around the real engine.

The rules are the same ones. A turn that breaks loses nothing: the messages it took go back to the inbox or are in the
engine, its plan is abandoned, and what it has refused is published.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from moestro.cluster.simulation.mesh import EpochBroken, Mesh
from moestro.cluster.simulation.model import NamedCache
from moestro.cluster.simulation.oracle import VOCAB_SIZE
from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceDelta
from moestro.workers.engine import Engine
from moestro.workers.rank_loop import Account
from moestro.workers.runner import StepRunner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.scheduler_sequence import StepPlan


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of what an engine does, and how long a collective may take."""

    step_s: float = 0.005
    token_s: float = 0.0001
    watchdog_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one turn has to say."""

    load: EngineLoad
    deltas: Sequence[SequenceDelta] = ()
    refusals: Sequence[tuple[str, str]] = ()  # sequence id and reason; never admitted
    lost: Sequence[tuple[str, str]] = ()  # sequence id and reason; given up, to be replayed


class Poisoned(Exception):
    """Computing this kills the process."""


class Turns:
    """Scheduler, cache and inbox of a worker, through all its epochs."""

    def __init__(self, config: SchedulerConfig, rng: random.Random, publish: Callable[[Output], None]) -> None:
        self.slowness = 1.0
        self.account = Account()
        self.inbox: list[bytes] = []
        self._config, self._costs, self._rng, self._publish = config, StepCosts(), rng, publish
        self.limits = EngineLimits(VOCAB_SIZE, config.context_limit, config.max_waiting)
        self._build()

    @property
    def load(self) -> EngineLoad:
        return replace(self._engine.load(), slowness=self.slowness)

    def _build(self) -> None:
        self._names = NamedCache(self._config, self._rng)
        self.scheduler = Scheduler(self._config)
        self._engine = Engine(self.scheduler, cast(StepRunner, self._names), self.limits)

    def begin_anew(self, epoch: int) -> None:
        """The ranks of a tensor-parallel set were parted in different turns: nobody can say which is right."""
        lost = [(name, "its tensor-parallel ranks were parted") for name in self.scheduler.sequence_ids]
        self._build()
        self.account.begin_anew(epoch)
        self._publish(Output(self.load, lost=lost))

    async def turn(self, mesh: Mesh, peers: tuple[int, ...], pause: Callable[[float], Awaitable[None]]) -> None:
        """One round; ``peers`` are the workers of the tensor-parallel set. Raises EpochBroken, Poisoned."""
        engine, account, costs = self._engine, self.account, self._costs
        time = asyncio.get_running_loop().time
        account.turn_since_s = time()
        refusals = self._take_in(await self._shared_inbox(mesh, peers))
        plan = engine.plan(time())
        account.turns += 1
        try:
            said = await mesh.gather((account.turns, plan.num_tokens, mesh.epoch), costs.watchdog_s)
            tokens = self._check_agreement(said, mesh, peers)
            if any(tokens):
                if self._names.kills(plan):
                    raise Poisoned
                await pause((costs.step_s + costs.token_s * plan.num_tokens) * self.slowness)
                await mesh.gather(None, costs.watchdog_s)
        except EpochBroken:
            self._abandon(plan, refusals)
            raise
        finally:
            account.turn_since_s = None
        deltas = engine.collect(plan, engine.launch(plan, tokens), time) if any(tokens) else engine.skip(plan, time())
        account.applied += 1
        self.scheduler.check_integrity()
        if deltas or refusals:
            self._publish(Output(self.load, deltas, refusals))
        if not any(tokens):
            await mesh.sleep()

    async def _shared_inbox(self, mesh: Mesh, peers: tuple[int, ...]) -> list[bytes]:
        """The leader's messages, on every rank of its set."""
        mine, self.inbox = self.inbox, []
        if len(peers) == 1:
            return mine
        try:
            shared: list[list[bytes]] = await mesh.gather(mine, self._costs.watchdog_s, peers)
        except EpochBroken:
            self.inbox[:0] = mine
            raise
        return shared[0]

    def _take_in(self, messages: list[bytes]) -> list[tuple[str, str]]:
        refusals = []
        now = asyncio.get_running_loop().time()
        self.account.messages += len(messages)
        for data in messages:
            message = pb.AttachRequest.FromString(data)
            if message.WhichOneof("message") == "cancel":
                self._engine.cancel(message.cancel)
            else:
                reason = self._engine.add(wire.decode_request(message.submit), now)
                if reason is not None:
                    refusals.append((message.submit.sequence_id, reason))
        return refusals

    def _check_agreement(
        self, said: Sequence[tuple[int, int, int]], mesh: Mesh, peers: tuple[int, ...]
    ) -> tuple[int, ...]:
        """By rank the tokens that are planned."""
        _, tokens, epochs = zip(*said, strict=True)
        assert set(epochs) == {mesh.epoch}, f"computes in epoch {mesh.epoch} with members of {epochs}"
        planned = {tokens[mesh.members.index(peer)] for peer in peers}
        assert len(planned) == 1, f"replicas have planned {planned}"
        return tuple(tokens)

    def _abandon(self, plan: StepPlan, refusals: Sequence[tuple[str, str]]) -> None:
        self._names.spoil(plan)
        self.scheduler.abandon(plan)
        self.scheduler.check_integrity()
        if refusals:
            self._publish(Output(self.load, refusals=refusals))
