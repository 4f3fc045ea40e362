"""A target inside this process that answers by a script: for tests, and for measuring the load generator alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from moestro.cluster.bench.target import Chunk, TargetError, TargetInfo
from moestro.cluster.bench.workload import BenchRequest


@dataclass(frozen=True, slots=True)
class Step:
    """Wait ``after_s`` seconds, then yield the chunk or raise the error."""

    after_s: float
    outcome: Chunk | TargetError


Script = Callable[[BenchRequest], Sequence[Step]]


def steady(ttft_s: float, itl_s: float) -> Script:
    """As many tokens as asked for, one a message, at fixed gaps, for any number of requests at a time."""

    def script(request: BenchRequest) -> list[Step]:
        gaps = [ttft_s] + [itl_s] * (request.output_tokens - 1)
        return [Step(gap, Chunk(1)) for gap in gaps]

    return script


class FakeTarget:
    """Plays ``script`` for every request. ``started`` holds the requests in the order they came."""

    def __init__(self, script: Script, vocab_size: int = 1000, max_context: int | None = None) -> None:
        self._script = script
        self._info = TargetInfo("fake", "scripted", vocab_size=vocab_size, max_context=max_context)
        self.started: list[BenchRequest] = []

    async def describe(self) -> TargetInfo:
        return self._info

    async def run(self, request: BenchRequest) -> AsyncGenerator[Chunk]:
        self.started.append(request)
        for step in self._script(request):
            await asyncio.sleep(step.after_s)
            if isinstance(step.outcome, TargetError):
                raise step.outcome
            yield step.outcome

    async def close(self) -> None:
        pass
