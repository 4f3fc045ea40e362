"""The experiment: record the answers, then load and faults together, then see that nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from benchmarks.chaos.inject import inject, ranks_lost
from benchmarks.chaos.load import Load, fault_free
from benchmarks.chaos.plan import Fault, Kind
from benchmarks.chaos.records import Record
from benchmarks.chaos.requests import Mix, build_pool
from benchmarks.chaos.strikes import Seen, Strike, followed, seen
from benchmarks.chaos.system import NotNow, NotPossible, System

from moestro.cluster.client import AsyncClient
from moestro.cluster.verify.suite import TEXTS
from moestro.protos.errors import MoestroError

LOOK_S = 0.05  # between two looks at the status
LOOK_TIMEOUT_S = 2.0
EMPTY_S = 20.0  # within which nothing of the load may be left at the ranks


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is asked and for how long. Faults come until ``faults`` have, or ``seconds`` are over."""

    seed: int
    clients: int = 8
    requests: int = 40  # different ones
    faults: int = 10**9
    seconds: float = 10**9
    request_s: float = 120.0  # deadline of each request
    whole_s: float = 90.0  # the next fault comes then at the latest
    calm_s: float = 2.0  # load before the first fault, and after the last
    mix: Mix = field(default_factory=Mix)


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was observed."""

    records: tuple[Record, ...]
    strikes: tuple[Strike, ...]
    history: tuple[Seen, ...]
    seconds: float
    is_empty: bool  # afterwards no stream is open and no block in use
    is_whole: bool  # afterwards every rank serves
    skipped: tuple[str, ...]  # faults that could not be had here, and why


class Experiment:
    """One run against one cluster."""

    def __init__(
        self, system: System, settings: Settings, faults: Iterator[Fault], tell: Callable[[str], None]
    ) -> None:
        self._system, self._settings, self._faults, self._tell = system, settings, faults, tell
        self._began_s = time.monotonic()
        self._history: list[Seen] = []
        self._strikes: list[Strike] = []
        self._impossible: dict[Kind, str] = {}
        self._looked = asyncio.Event()

    def clock(self) -> float:
        return time.monotonic() - self._began_s

    async def run(self) -> Result:
        """Raises MoestroError when even the undisturbed requests fail."""
        settings = self._settings
        async with AsyncClient(self._system.address, settings.request_s) as client:
            (model,) = await client.models()
            texts = [await client.tokenize(text) for text in TEXTS]
            pool = build_pool(model, texts, settings.requests, settings.seed, settings.mix)
            self._tell(f"recording {len(pool)} answers")
            expected = await fault_free(client, pool)
        self._began_s = time.monotonic()
        load = Load(self._system.address, pool, expected, settings.seed, settings.mix, settings.request_s, self.clock)
        looking = asyncio.create_task(self._look())
        asking = asyncio.create_task(load.run(settings.clients))
        try:
            await asyncio.sleep(settings.calm_s)
            await self._strike_all()
            await self._wait_whole()
            await asyncio.sleep(settings.calm_s)
            load.stop()
            await asking
            seconds = self.clock()
            is_empty = await self._becomes(lambda now: now.open_streams == 0 and now.busy_blocks == 0, EMPTY_S)
            is_whole = await self._becomes(lambda now: now.serving == self._system.num_ranks, settings.whole_s)
        finally:
            for task in (looking, asking):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        records = sorted(load.records, key=lambda record: record.ended_s)
        strikes = followed(self._strikes, self._history, records, self._system.num_ranks)
        return Result(
            tuple(records),
            tuple(strikes),
            tuple(self._history),
            seconds,
            is_empty,
            is_whole,
            tuple(self._impossible.values()),
        )

    async def _strike_all(self) -> None:
        settings, running = self._settings, set[asyncio.Task[None]]()
        for fault in self._faults:
            if len(self._strikes) >= settings.faults or self.clock() >= settings.seconds:
                break
            if fault.kind in self._impossible:
                continue
            if not fault.impatient:
                if running:
                    await asyncio.wait(running)
                await self._wait_whole()
            await asyncio.sleep(fault.after_s)
            if self._serving() <= ranks_lost(self._system, fault):  # of nothing, nothing can be kept
                continue
            try:
                await self._start(fault, running)
            except NotNow:
                continue
            except NotPossible as reason:
                self._impossible[fault.kind] = str(reason)
                self._tell(f"skipped from now on: {reason}")
        if running:
            await asyncio.wait(running)

    def _serving(self) -> int:
        """Ranks, as far as is known."""
        return next((each.serving for each in reversed(self._history) if each.answered), 0)

    async def _start(self, fault: Fault, running: set[asyncio.Task[None]]) -> None:
        """Returns once it has struck. Raises as ``inject`` does."""
        has_struck = asyncio.Event()

        def struck(target: str) -> None:
            strike = Strike(fault.number, fault.kind.value, target, self.clock(), self.clock() + fault.lasts_s)
            self._strikes.append(strike)
            self._tell(f"{strike.at_s:7.1f} s  {len(self._strikes)}: {fault.kind.value}, {target}")
            has_struck.set()

        task = asyncio.create_task(inject(self._system, fault, struck))
        waiting = asyncio.create_task(has_struck.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not has_struck.is_set():
            waiting.cancel()
            await task
            raise RuntimeError(f"{fault.kind.value} did nothing")
        running.add(task)
        task.add_done_callback(running.discard)

    async def _wait_whole(self) -> None:
        """All ranks have served for a few looks, or ``whole_s`` are over."""
        calm = 4 * LOOK_S
        since: list[float] = []

        def holds(now: Seen) -> bool:
            if now.serving != self._system.num_ranks or not now.answered:
                since.clear()
                return False
            since.append(now.at_s)
            return now.at_s - since[0] >= calm

        await self._becomes(holds, self._settings.whole_s)

    async def _becomes(self, holds: Callable[[Seen], bool], limit_s: float) -> bool:
        """Waits for a look of which it is true, up to a limit."""
        deadline_s = self.clock() + limit_s
        while self.clock() < deadline_s:
            self._looked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked.wait(), LOOK_TIMEOUT_S)
                if self._history[-1].answered and holds(self._history[-1]):
                    return True
        return False

    async def _look(self) -> None:
        async with AsyncClient(self._system.address, LOOK_TIMEOUT_S, retries=0) as client:
            while True:
                try:
                    now = seen(self.clock(), await client.status())
                    now = replace(now, at_s=self.clock())
                except (MoestroError, TimeoutError):
                    now = Seen(self.clock(), answered=False)
                self._history.append(now)
                self._looked.set()
                await asyncio.sleep(LOOK_S)
