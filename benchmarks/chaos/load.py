"""Clients that ask without pause, each one request at a time, and judge what they get. Public client only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import cast

from benchmarks.chaos.judge import judge_answer, judge_beginning
from benchmarks.chaos.records import Record, Verdict
from benchmarks.chaos.requests import How, Mix, Turn, turns

from moestro.cluster.client import AsyncClient
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.verify.suite import Case
from moestro.protos.errors import MoestroError

PAUSE_S = 0.2  # after a request was lost, so that a server that is down is not asked a thousand times
ASKED_TOGETHER = 8


async def fault_free(client: AsyncClient, pool: Sequence[Case]) -> dict[str, Completion]:
    """The answers by the name of the request, recorded while nothing is broken. Raises MoestroError, TimeoutError."""
    places = asyncio.Semaphore(ASKED_TOGETHER)

    async def ask(case: Case) -> Completion:
        async with places:
            return gather([event async for event in stream(client, case)])

    answers = await asyncio.gather(*(ask(case) for case in pool))
    return {case.name: answer for case, answer in zip(pool, answers, strict=True)}


def stream(client: AsyncClient, case: Case) -> AsyncGenerator[StreamEvent]:
    """The request's events: a prompt in words is a chat. Closing it early cancels the request."""
    if isinstance(case.prompt, str):
        return cast("AsyncGenerator[StreamEvent]", client.stream_chat(case.prompt, **case.options))
    return cast("AsyncGenerator[StreamEvent]", client.stream(case.prompt, **case.options))


class Load:
    """``clients`` closed loops against one address. Use ``run`` as a task; ``stop`` lets what runs come to its end."""

    def __init__(
        self,
        address: str,
        pool: Sequence[Case],
        expected: Mapping[str, Completion],
        seed: int,
        mix: Mix,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._pool, self._expected, self._seed = address, pool, expected, seed
        self._mix, self._timeout_s, self._clock = mix, timeout_s, clock
        self._stopping = asyncio.Event()
        self.records: list[Record] = []

    def stop(self) -> None:
        self._stopping.set()

    async def run(self, clients: int) -> None:
        """Returns when all have ended after ``stop``."""
        await asyncio.gather(*(self._client(number) for number in range(clients)))

    async def _client(self, number: int) -> None:
        # A connection each, so that they spread over the gateways.
        async with AsyncClient(self._address, self._timeout_s) as client:
            for turn in turns(self._pool, self._seed, number, self._mix):
                if self._stopping.is_set():
                    return
                record = await self._ask(client, turn, number)
                self.records.append(record)
                if record.verdict is Verdict.LOST:
                    await asyncio.sleep(PAUSE_S)

    async def _ask(self, client: AsyncClient, turn: Turn, number: int) -> Record:
        attempt = _Attempt(self._clock, self._expected[turn.case.name])
        try:
            verdict, detail = await attempt.run(client, turn)
        except (MoestroError, TimeoutError, ValueError) as error:
            verdict, detail = Verdict.LOST, f"{turn.case.name}: {type(error).__name__}: {error}"
            # What arrived before the end counts too: it must not have been wrong.
            if wrong := judge_beginning(turn.case.name, attempt.expected, attempt.events):
                verdict, detail = Verdict.DIFFERENT, wrong
        return Record(
            case=turn.case.name,
            how=turn.how.value,
            client=number,
            sent_s=attempt.sent_s,
            ended_s=self._clock(),
            arrivals_s=tuple(attempt.arrivals_s),
            tokens=tuple(attempt.tokens),
            verdict=verdict,
            detail=detail,
            migrations=attempt.migrations,
        )


class _Attempt:
    """One request and what has come of it."""

    def __init__(self, clock: Callable[[], float], expected: Completion) -> None:
        self.expected = expected
        self.sent_s = clock()
        self.events: list[StreamEvent] = []
        self.arrivals_s: list[float] = []
        self.tokens: list[int] = []
        self.migrations = 0
        self._clock = clock

    async def run(self, client: AsyncClient, turn: Turn) -> tuple[Verdict, str]:
        case = turn.case
        if turn.how is How.WHOLE and not isinstance(case.prompt, str):
            answer = await client.generate(case.prompt, **case.options)
            self._arrived(sum(len(choice.token_ids) for choice in answer.choices))
        else:
            async with aclosing(stream(client, case)) as events:
                async for event in events:
                    self.events.append(event)
                    self._arrived(sum(len(delta.token_ids) for delta in event.deltas))
                    if turn.how is How.CANCEL and len(self.events) >= turn.events:
                        break
            if wrong := judge_beginning(case.name, self.expected, self.events):
                return Verdict.DIFFERENT, wrong
            if turn.how is How.CANCEL:
                return Verdict.EQUAL, ""
            answer = gather(self.events)
        self.migrations = answer.usage.migrations
        wrong = judge_answer(case.name, self.expected, answer)
        return (Verdict.DIFFERENT, wrong) if wrong else (Verdict.EQUAL, "")

    def _arrived(self, tokens: int) -> None:
        self.arrivals_s.append(self._clock())
        self.tokens.append(tokens)
