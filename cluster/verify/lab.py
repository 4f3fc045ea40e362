"""Asking the suite: one request after another or all at once, and with others in the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from moestro.cluster.client_results import ClusterStatus, ModelInfo
from moestro.cluster.edge.events import Completion
from moestro.cluster.verify.suite import Case, filler
from moestro.cluster.verify.target import NotApplicable, Target
from moestro.protos.errors import MoestroError
from moestro.protos.sequences import Diagnostics

NUM_FILLERS = 8  # requests in the way at any time
ARRIVAL_S = 0.05  # those of a crowd come within so many seconds, so that prompts meet answers under way


@dataclass(frozen=True, slots=True)
class Places:
    """Where requests are served. Ranks are leaders of their tensor-parallel sets, in service, by name."""

    group: str = ""  # empty: the server names none
    home: str = ""  # the rank of the baseline; empty: wherever the server likes
    others: tuple[str, ...] = ()  # other ranks of the same group
    elsewhere: tuple[str, ...] = ()  # one rank of each other group


def find_places(status: ClusterStatus) -> Places:
    """The first rank of the first group that serves, and what there is beside it."""
    leaders = {
        group.name: tuple(r.name for r in group.ranks if r.tp_rank == 0 and r.state == "serving")
        for group in status.groups
    }
    serving = [(name, ranks) for name, ranks in leaders.items() if ranks]
    if not serving:
        return Places()
    (group, (home, *others)), *rest = serving
    return Places(group, home, tuple(others), tuple(ranks[0] for _, ranks in rest))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what came of it: an answer, or why there is none."""

    case: Case
    result: Completion | str


Disturb = Callable[[Case], Diagnostics]


@dataclass(frozen=True, slots=True)
class Lab:
    """A cluster, the suite, and the answers of the undisturbed requests by name, once there are any."""

    target: Target
    model: ModelInfo
    places: Places
    cases: tuple[Case, ...]
    seed: int
    baseline: dict[str, Completion] = field(default_factory=dict)

    def at(self, rank: str) -> Disturb:
        """Nothing but the choice of a rank."""
        return lambda case: Diagnostics(rank=rank, trace=True)

    def rng(self, what: str) -> random.Random:
        """Chance of its own for each purpose, the same in every run of one seed."""
        return random.Random(f"{what} {self.seed}")

    async def one_by_one(self, disturb: Disturb, cases: Sequence[Case] | None = None) -> list[Asked]:
        """Each alone on the cluster, as far as it is ours."""
        return [await self._ask(case, disturb(case)) for case in cases or self.cases]

    async def together(self, disturb: Disturb, cases: Sequence[Case] | None = None) -> list[Asked]:
        """All at once, arriving in their order."""
        return list(await asyncio.gather(*(self._ask(case, disturb(case)) for case in cases or self.cases)))

    async def scattered(self, disturb: Disturb) -> list[Asked]:
        """All within a moment, each at a time of its own."""
        rng = self.rng("arrivals")
        delays_s = [rng.uniform(0.0, ARRIVAL_S) for _ in self.cases]
        pairs = zip(self.cases, delays_s, strict=True)
        return list(await asyncio.gather(*(self._ask(case, disturb(case), delay_s) for case, delay_s in pairs)))

    @asynccontextmanager
    async def crowd(self) -> AsyncIterator[list[Case]]:
        """Fills the cluster with other requests while inside; yields the growing list of those."""
        begun: list[Case] = []

        async def fill(number: int) -> None:
            rng = self.rng(f"filler {number}")
            while True:
                begun.append(filler(self.model, rng))
                await self.target.ask(begun[-1], Diagnostics())

        tasks = [asyncio.create_task(fill(number)) for number in range(NUM_FILLERS)]
        try:
            yield begun
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [error for error in ended if isinstance(error, Exception)]
        if failures:
            raise NotApplicable(f"the requests in the way failed: {failures[0]}")

    async def _ask(self, case: Case, diagnostics: Diagnostics, delay_s: float = 0.0) -> Asked:
        await asyncio.sleep(delay_s)
        try:
            return Asked(case, await self.target.ask(case, diagnostics))
        except (MoestroError, TimeoutError) as error:
            return Asked(case, f"{type(error).__name__}: {error}")
