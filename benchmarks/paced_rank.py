"""A rank whose steps take a given time and compute nothing: real scheduler, KV blocks, wire and sockets around it.

What a cluster does under more load than it can carry is decided by schedulers and gateways. With a model in the way it
would be measured through the noise of two shared cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos import wire
from moestro.protos.errors import InvalidRequest, Overloaded
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import EngineLimits, SampledToken
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig
from moestro.workers.scheduler_sequence import StepPlan

SECRET = "paced"
VOCABULARY = 95


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step, and of each token in it."""

    step_s: float = 0.02
    token_s: float = 0.00005


def config(
    seats: int, blocks: int = 4096, max_waiting: int = 4096, max_context: int = 1024, block_size: int = 16
) -> SchedulerConfig:
    return SchedulerConfig(
        groups=(CacheGroup(None, blocks),),
        block_size=block_size,
        max_num_sequences=seats,
        max_num_tokens=max(512, seats),
        max_context=max_context,
        max_waiting=max_waiting,
    )


@dataclass
class PacedRank:
    """One rank. ``run`` is its engine, on the loop of its server."""

    config: SchedulerConfig
    pace: Pace = field(default_factory=Pace)
    num_prompt_tokens: int = 0  # computed, ever
    prefilled: list[str] = field(default_factory=list)  # ids of sequences, when their first token comes
    steps: list[tuple[float, int]] = field(default_factory=list)  # by time.perf_counter, and how many sequences ran

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self._inbox: list[bytes] = []
        self._woken = asyncio.Event()
        self.server = RankServer(
            self._submit,
            self.limits,
            self.scheduler.load(),
            SECRET,
            1,
            experts=lambda: ExpertsReport("paced", 0, 0, 0.0, (), ()),
            request_placement=_refuse,
        )

    @property
    def limits(self) -> EngineLimits:
        c = self.config
        return EngineLimits(VOCABULARY, c.context_limit, c.max_waiting, c.max_num_sequences, c.pool_tokens)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[GroupEntry]:
        """Listens; gives the group that it is alone."""
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        rank_pb2_grpc.add_RankServiceServicer_to_server(self.server, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        engine = asyncio.create_task(self._run())
        try:
            entry = RankEntry(0, 0, RankState.SERVING, f"127.0.0.1:{port}")
            yield GroupEntry(f"paced-{port}", 1, 1, 1, (entry,))
        finally:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            await server.stop(0)

    def _submit(self, data: bytes) -> None:
        self._inbox.append(data)
        self._woken.set()

    async def _run(self) -> None:
        while True:
            refusals = self._take_in()
            plan = self.scheduler.plan(time.monotonic())
            if plan.spans:
                await asyncio.sleep(self.pace.step_s + self.pace.token_s * plan.num_tokens)
                self.steps.append((time.perf_counter(), len(plan.spans)))
            deltas = self.scheduler.apply(plan, self._sample(plan), time.monotonic())
            if plan.spans or deltas or refusals:
                self.server.publish(deltas, refusals, self.scheduler.load())
            if not self.scheduler.has_work:
                self._woken.clear()
                if not self._inbox:
                    await self._woken.wait()

    def _take_in(self) -> list[tuple[str, str]]:
        messages, self._inbox = self._inbox, []
        refusals = []
        for data in messages:
            message = pb.AttachRequest.FromString(data)
            if message.WhichOneof("message") == "cancel":
                self.scheduler.cancel(message.cancel)
                continue
            try:
                self.scheduler.add(wire.decode_request(message.submit), time.monotonic())
            except (InvalidRequest, Overloaded) as refusal:
                refusals.append((message.submit.sequence_id, str(refusal)))
        return refusals

    def _sample(self, plan: StepPlan) -> dict[str, SampledToken]:
        """Any function of the position will do."""
        sampled = {}
        for sequence, start, length, samples in plan.spans:
            self.num_prompt_tokens += max(0, min(start + length, sequence.num_prompt) - start)
            if samples:
                sampled[sequence.sequence_id] = SampledToken((start + length) % VOCABULARY)
                if len(sequence.token_ids) == sequence.num_prompt:
                    self.prefilled.append(sequence.sequence_id)
        return sampled


def _refuse(request: PlacementRequest) -> None:
    raise InvalidRequest([])
