"""A group that serves, simulated: seeded traffic, a load model of step time, background threads that take their time.

Two machines are told the same things and must ask for the same things. The group also checks the protocol: one job at a
time, only what is ready switches, and a layer serves by what was last switched.

Legend: L mixture layers, E logical experts, R ranks, C slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.messages import Drop, Intent, Observation, StartLoad, StartSolve, Switch
from moestro.router.rebalance.rebalancer import Rebalancer

RANKS, EXPERTS, CAPACITY, LAYERS = 4, 16, 5, 3
EXPERT_BYTES = 10_000_000
S_PER_ROW = 20e-6
QUICK = Config(window_s=8, interval_s=4, horizon_s=120, bytes_per_s=100e6, settle_s=4, backoff_s=30)

Solver = Callable[[NDArray[np.int64], tuple[Placement, ...]], tuple[Placement, ...]]
"""A ``Solve`` that knows by itself who is slow."""

Popularity = Callable[[float], NDArray[np.float64]]
"""From time to popularity_LE, rows summing to 1; all zeros: idle."""


def even(now: float) -> NDArray[np.float64]:
    return np.full((LAYERS, EXPERTS), 1 / EXPERTS)


def skewed(hot: int, weight: float = 0.5, layers: range = range(LAYERS)) -> Popularity:
    """Half the rows go to four neighbouring experts from ``hot`` on, which ``spread`` puts on one rank."""
    popularity_LE = even(0).copy()
    for layer in layers:
        popularity_LE[layer] = (1 - weight) / (EXPERTS - 4)
        popularity_LE[layer, hot : hot + 4] = weight / 4
    return lambda now: popularity_LE


def alternating(period_s: float, *phases: Popularity) -> Popularity:
    return lambda now: phases[int(now / period_s) % len(phases)](now)


def greedy(loads_LE: NDArray[np.int64], previous: tuple[Placement, ...]) -> tuple[Placement, ...]:
    """A plain solver: the free slots go to the hottest experts, the rest is longest-processing-time-first; experts stay
    in their slots where they can."""
    return tuple(_pack(loads_E, old) for loads_E, old in zip(loads_LE, previous, strict=True))


def _pack(loads_E: NDArray[np.int64], old: Placement) -> Placement:
    copies_E = np.ones(old.num_experts, dtype=np.int64)
    for _ in range(old.num_slots - old.num_experts):
        copies_E[np.argmax(np.where(copies_E < old.num_ranks, loads_E / copies_E, -1.0))] += 1
    pieces = sorted((-loads_E[e] / copies_E[e], e) for e in range(len(loads_E)) for _ in range(copies_E[e]))
    held: list[list[int]] = [[] for _ in range(old.num_ranks)]
    load_R = [0.0] * old.num_ranks
    for negative, expert in pieces:
        open_ranks = [r for r in range(old.num_ranks) if len(held[r]) < old.capacity and expert not in held[r]]
        if not open_ranks:
            continue  # its other copies have a place, and another expert takes the slot
        rank = min(open_ranks, key=lambda r: (load_R[r], expert not in old.slots[r], r))
        held[rank].append(expert)
        load_R[rank] -= negative
    return Placement(old.num_experts, tuple(_aligned(new, kept) for new, kept in zip(held, old.slots, strict=True)))


def _aligned(experts: list[int], old: tuple[int, ...]) -> tuple[int, ...]:
    arrivals = [e for e in experts if e not in old]
    return tuple(e if e in experts else arrivals.pop(0) if arrivals else EMPTY for e in old)


@dataclass
class Group:
    popularity: Popularity
    seed: int = 0
    config: Config = QUICK
    solve: Solver = greedy
    tokens_per_step: int = 400
    noise: float = 0.0  # relative, of every measured time
    load_slowdown: float = 0.05  # true fraction by which loading slows a step
    stall_s: float = 0.003
    harm: Callable[[tuple[Placement, ...]], float] = lambda placements: 0.0  # hidden fraction of slowness
    late_s: float = 0.0  # how long after its bytes a load is reported ready
    steps_per_gather: int = 8
    slowness: tuple[float, ...] = ()  # by rank
    now: float = 0.0
    bytes_moved: int = 0
    switches: list[tuple[float, int]] = field(default_factory=list)  # time, layer
    intents: list[Intent] = field(default_factory=list)
    busy_s: float = 0.0  # step time since the start
    tokens: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.placements = (spread(EXPERTS, RANKS, CAPACITY),) * LAYERS
        self.machine, self.twin = (Rebalancer(self.config, self.placements, EXPERT_BYTES) for _ in range(2))
        self.job: StartSolve | StartLoad | None = None
        self.done_at = 0.0
        self.switch_s = 0.0
        self.last = np.zeros((LAYERS, RANKS))

    def run(self, seconds: float) -> Group:
        until = self.now + seconds
        while self.now < until:
            self.gather()
        return self

    def gather(self) -> None:
        """Some steps, their observation, and what comes of it."""
        if self.job and self.now >= self.done_at:
            job, finished = self.job, []
            for machine in (self.machine, self.twin):
                if isinstance(job, StartSolve):
                    machine.solved(job.ticket, self.solve(job.loads_LE, job.previous))
                    self.job = None
                else:
                    machine.ready(job.ticket)
                    finished.append(job.ticket)
        seen = self._serve()
        intents = self.machine.observe(seen, self.slowness)
        self.obey(intents, self.twin.observe(seen, self.slowness))

    def obey(self, intents: tuple[Intent, ...], twins: tuple[Intent, ...]) -> None:
        assert list(map(_told, intents)) == list(map(_told, twins))
        self.intents += intents
        for intent in intents:
            match intent:
                case Drop(ticket=ticket):
                    assert self.job is not None
                    assert self.job.ticket == ticket
                    self.job = None
                case StartSolve():
                    assert self.job is None
                    self.job, self.done_at = intent, self.now + 0.7
                case StartLoad(layer=layer, placement=new):
                    assert self.job is None
                    per_rank = [
                        sum(a != b != EMPTY for a, b in zip(x, y, strict=True))
                        for x, y in zip(self.placements[layer].slots, new.slots, strict=True)
                    ]
                    self.bytes_moved += sum(per_rank) * EXPERT_BYTES
                    seconds = max(per_rank) * EXPERT_BYTES / intent.bytes_per_s
                    self.job, self.done_at = intent, self.now + seconds + self.late_s
                    self.loading_s = seconds
                case Switch(ticket=ticket, layer=layer, placement=new):
                    assert isinstance(self.job, StartLoad)
                    assert (self.job.ticket, self.job.layer, self.job.placement) == (ticket, layer, new)
                    assert self.now >= self.done_at
                    self.job = None
                    self.placements = (*self.placements[:layer], new, *self.placements[layer + 1 :])
                    self.switches.append((self.now, layer))
                    self.switch_s = self.stall_s
        assert self.machine.placements == self.twin.placements == self.placements

    def _serve(self) -> Observation:
        popularity_LE = self.popularity(self.now)
        rows_LRC = np.zeros((LAYERS, RANKS, CAPACITY), dtype=np.int64)
        if popularity_LE.any():
            for layer, placement in enumerate(self.placements):
                loads_E = self.random.multinomial(self.tokens_per_step * self.steps_per_gather, popularity_LE[layer])
                for expert, slots in enumerate(placement.slots_of_expert):
                    for copy, slot in enumerate(slots):
                        rows = (loads_E[expert] + copy) // len(slots)
                        rows_LRC[layer, slot // CAPACITY, slot % CAPACITY] = rows
        tokens = self.tokens_per_step * self.steps_per_gather if popularity_LE.any() else 0
        rows_LR = rows_LRC.sum(axis=2) * np.array(self.slowness or (1,) * RANKS)  # as long as they take
        slow = 1 + self.harm(self.placements)
        loading = isinstance(self.job, StartLoad)
        if loading:
            slow += self.load_slowdown
        experts_s_R = rows_LR.sum(axis=0) * S_PER_ROW + self.steps_per_gather * 1e-4
        waiting_s_R = (rows_LR.max(axis=1, keepdims=True) - rows_LR).sum(axis=0) * S_PER_ROW + 1e-3
        base_s = self.steps_per_gather * 2e-3 + tokens * 1e-5
        steps_s = (base_s + rows_LR.max(axis=1).sum() * S_PER_ROW) * slow * self._noise()
        wall_s = max(steps_s, 0.2) + self.switch_s
        loaded = 0
        if loading:
            loaded = int(self.config.bytes_per_s * min(wall_s, max(0.0, self.done_at - self.late_s - self.now)))
        self.now += wall_s
        self.busy_s += steps_s + self.switch_s
        self.tokens += tokens
        seen = Observation(
            now=self.now,
            steps=self.steps_per_gather if tokens else 0,
            rows_LRC=rows_LRC,
            tokens_R=np.full(RANKS, tokens // RANKS),
            steps_s_R=np.full(RANKS, steps_s if tokens else 0.0),
            experts_s_R=np.array([s * self._noise() for s in experts_s_R]) * bool(tokens),
            waiting_s_R=np.array([s * self._noise() for s in waiting_s_R]) * bool(tokens),
            loaded_bytes_R=np.full(RANKS, loaded),
            switch_s_R=np.full(RANKS, self.switch_s),
        )
        self.switch_s = 0.0
        return seen

    def _noise(self) -> float:
        return float(max(0.2, 1 + self.noise * self.random.standard_normal()))

    def loss(self) -> float:
        """Mean over layers of how much longer the busiest rank computes than the mean, by true popularity."""
        popularity_LE = self.popularity(self.now)
        worst = []
        for popularity_E, placement in zip(popularity_LE, self.placements, strict=True):
            load_R = np.zeros(RANKS)
            for expert, slots in enumerate(placement.slots_of_expert):
                for slot in slots:
                    load_R[slot // CAPACITY] += popularity_E[expert] / len(slots)
            worst.append(load_R.max() * RANKS - 1)
        return float(np.mean(worst))


def _told(intent: Intent) -> object:
    return (intent.ticket, intent.loads_LE.tolist(), intent.previous) if isinstance(intent, StartSolve) else intent
