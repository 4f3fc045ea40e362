"""Puts a load on a target and writes down what happened.

The clock is the running event loop's, so a test that brings a loop with a clock of its own gets exact times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from moestro.cluster.bench.records import RequestRecord, ServerLedger
from moestro.cluster.bench.target import Target, TargetError
from moestro.cluster.bench.workload import BenchRequest

TIMEOUT = "CLIENT_TIMEOUT"  # the client gave up
NO_OUTPUT = "NO_OUTPUT"  # the stream ended well without a single token
_PAUSE_AFTER_FAILURE_S = 0.05  # a closed loop must not hammer a server that refuses
_PROBE_EVERY_S = 0.02

OnRecord = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True)
class RoundRun:
    """The raw result of a round, records by request number."""

    records: tuple[RequestRecord, ...]
    loop_delays_s: tuple[float, ...]
    cpu_s: float  # processor time of this whole process during the round


async def run_scheduled(
    target: Target,
    requests: Sequence[BenchRequest],
    times_s: Sequence[float],
    *,
    timeout_s: float,
    on_record: OnRecord | None = None,
) -> RoundRun:
    """Open loop: sends request i at ``times_s[i]`` (seconds from now, never decreasing), however the others fare, and
    returns when all have ended."""
    recorder = _Recorder(target, timeout_s, on_record)
    async with _Probe() as probe, asyncio.TaskGroup() as tasks:
        for request, time_s in zip(requests, times_s, strict=True):
            await recorder.wait_until(time_s)
            tasks.create_task(recorder.record(request, time_s))
    return recorder.result(probe)


async def run_closed(
    target: Target,
    requests: Iterable[BenchRequest],
    concurrency: int,
    *,
    timeout_s: float,
    duration_s: float | None = None,
    on_record: OnRecord | None = None,
) -> RoundRun:
    """Closed loop: ``concurrency`` clients take requests in turn until they run out or ``duration_s`` has passed, and
    returns when all that were sent have ended. A client whose request failed pauses for 50 ms."""
    recorder = _Recorder(target, timeout_s, on_record)
    queue: Iterator[BenchRequest] = iter(requests)

    async def client() -> None:
        while duration_s is None or recorder.now() < duration_s:
            request = next(queue, None)
            if request is None:
                return
            record = await recorder.record(request, None)
            if record.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async with _Probe() as probe, asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(client())
    return recorder.result(probe)


class _Recorder:
    """Runs single requests against the clock of one round, which starts when it is made."""

    def __init__(self, target: Target, timeout_s: float, on_record: OnRecord | None) -> None:
        self._target, self._timeout_s, self._on_record = target, timeout_s, on_record
        self._clock = asyncio.get_running_loop().time
        self._start_s, self._start_cpu_s = self._clock(), time.process_time()
        self._records: list[RequestRecord] = []

    def now(self) -> float:
        return self._clock() - self._start_s

    async def wait_until(self, time_s: float) -> None:
        # A sleep of 0 even when late: the requests already started must get the loop between two of a burst.
        await asyncio.sleep(max(0.0, time_s - self.now()))

    async def record(self, request: BenchRequest, scheduled_s: float | None) -> RequestRecord:
        times_s: list[float] = []
        tokens: list[int] = []
        finish_reason: str | None = None
        input_tokens = request.input_tokens
        ledger: ServerLedger | None = None
        error: tuple[str, str] | None = None
        sent_s = self.now()
        try:
            async with asyncio.timeout(self._timeout_s), aclosing(self._target.run(request)) as chunks:
                async for chunk in chunks:
                    if chunk.num_tokens:
                        times_s.append(self.now())
                        tokens.append(chunk.num_tokens)
                    finish_reason = chunk.finish_reason or finish_reason
                    input_tokens = input_tokens if chunk.input_tokens is None else chunk.input_tokens
                    ledger = chunk.ledger or ledger
        except TargetError as failure:
            error = failure.code, failure.message
        except TimeoutError:
            error = TIMEOUT, f"not finished {self._timeout_s:g} s after it was sent"
        if error is None and not tokens:
            error = NO_OUTPUT, f"the stream ended without a token (finish reason {finish_reason})"
        record = RequestRecord(
            index=request.index,
            scheduled_s=sent_s if scheduled_s is None else scheduled_s,
            sent_s=sent_s,
            done_s=self.now(),
            asked_tokens=request.output_tokens,
            input_tokens=input_tokens,
            message_times_s=tuple(times_s),
            message_tokens=tuple(tokens),
            finish_reason=finish_reason,
            error=error[0] if error else None,
            error_message=error[1] if error else None,
            ledger=ledger,
        )
        self._records.append(record)
        if self._on_record is not None:
            self._on_record(record)
        return record

    def result(self, probe: _Probe) -> RoundRun:
        records = tuple(sorted(self._records, key=lambda r: r.index))
        return RoundRun(records, tuple(probe.delays_s), time.process_time() - self._start_cpu_s)


class _Probe:
    """Samples how late the event loop wakes a sleeper: a token that arrives while it is busy is stamped that late."""

    def __init__(self) -> None:
        self.delays_s: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Probe:
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _sample(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due_s = clock() + _PROBE_EVERY_S
            await asyncio.sleep(_PROBE_EVERY_S)
            self.delays_s.append(max(0.0, clock() - due_s))
