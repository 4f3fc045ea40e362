"""What happens in a simulation, drawn from its seed before it begins: a cluster, requests, and faults."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from moestro.cluster.simulation.oracle import EOS, NOT_A_NUMBER, POISON, VOCABULARY, Answer, right_answer
from moestro.protos.sequences import Diagnostics, SamplingParams
from moestro.workers.sampling.seeds import derive_seed
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

SHAPES = ((1, 2, 1), (1, 3, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (2, 1, 1), (1, 2, 2), (1, 3, 2), (2, 1, 2))
"""Groups, data-parallel and tensor-parallel ranks of each."""


class Habit(Enum):
    """How a client reads its answer."""

    READS = "reads"
    CANCELS = "cancels"  # after some events
    VANISHES = "vanishes"  # its process is killed after some events
    SLOW = "slow"  # takes its time with every event
    COMES_BACK = "comes back"  # its connection breaks after some events, and it resumes


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of one client, and the right answer of each of its choices."""

    name: str
    at_s: float
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    n: int
    seed: int
    priority: int
    diagnostics: Diagnostics
    habit: Habit
    habit_at: int  # events
    is_by_hand: bool  # a client in another language, not the Python library
    answers: tuple[Answer, ...]

    @property
    def is_poison(self) -> bool:
        return POISON in self.prompt_ids

    @property
    def is_not_a_number(self) -> bool:
        return NOT_A_NUMBER in self.prompt_ids


class FaultKind(Enum):
    """What can go wrong."""

    KILL_RANK = "kill rank"
    STOP_RANK = "stop rank"
    SLOW_RANK = "slow rank"
    PART_RANK = "part rank"  # from a gateway
    PART_RANKS = "part ranks"  # two from each other
    PART_SUPERVISOR = "part supervisor"  # from one of its ranks
    FAIL_LOAD = "fail load"  # of the next worker that is started in a group
    CUT_LINK = "cut link"  # between a gateway and a rank
    KILL_DIRECTORY = "kill directory"
    KILL_GATEWAY = "kill gateway"
    KILL_GROUP = "kill group"  # its supervisor, and with it all that it started
    CUT_CLIENTS = "cut clients"  # every connection of clients to a gateway


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong at a time; ``target`` picks among what is there then."""

    at_s: float
    kind: FaultKind
    target: int
    other: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """All of it. Frozen: the run draws from generators of its own."""

    seed: int
    groups: int
    dp: int
    tp: int
    gateways: int
    scheduler: SchedulerConfig
    num_experts: int
    redundant: int
    most_slots: int  # experts of a layer that fit on a rank
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"scenario {seed}")
    scheduler = _scheduler(rng)
    groups, dp, tp = rng.choice(SHAPES)
    span_s = rng.choice((0.1, 0.3, 1.0, 3.0))
    special = rng.random()
    common = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.choice((0, 0, 12, 24))))
    asks = [_ask(rng, number, common, scheduler, span_s) for number in range(rng.randint(3, 12))]
    if special < 0.15:
        asks[0] = _tainted(asks[0], POISON, scheduler)
    elif special < 0.3:
        asks[0] = _tainted(asks[0], NOT_A_NUMBER, scheduler)
    num_experts = rng.randint(4, 8)
    fewest_slots = -(-num_experts // (dp * tp))
    return Scenario(
        seed=seed,
        groups=groups,
        dp=dp,
        tp=tp,
        gateways=rng.randint(1, 2),
        scheduler=scheduler,
        num_experts=num_experts,
        redundant=rng.choice((0, 0, 2)),
        most_slots=rng.choice((fewest_slots, 2 * fewest_slots, num_experts, num_experts)),
        asks=tuple(asks),
        faults=_faults(rng, asks),
    )


def _scheduler(rng: random.Random) -> SchedulerConfig:
    """Tight enough that sequences wait, are preempted and chunked."""
    block_size = rng.choice((2, 4))
    max_num_sequences = rng.randint(2, 6)
    groups = [CacheGroup(None, 64 // block_size + rng.randint(0, 16) + 1)]
    if rng.random() < 0.3:
        groups.append(CacheGroup(rng.choice((5, 9)), groups[0].num_blocks))
    return SchedulerConfig(
        groups=tuple(groups),
        block_size=block_size,
        max_num_sequences=max_num_sequences,
        max_num_tokens=rng.choice((max_num_sequences, 8, 32)) if max_num_sequences <= 8 else 32,
        max_context=64,
        max_waiting=rng.choice((8, 64)),
    )


def _ask(rng: random.Random, number: int, common: tuple[int, ...], scheduler: SchedulerConfig, span_s: float) -> Ask:
    prompt = common + tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.choice((1, 3, 8, 20))))
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 1.0)),
        max_tokens=rng.randint(1, 64 - len(prompt) if len(prompt) > 33 else 30),
        min_tokens=rng.choice((0, 0, 1)),
        ignore_eos=rng.random() < 0.3,
        eos_token_ids=(EOS,),
        stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice((0, 0, 1)))),
        logprobs=rng.choice((None, None, 2)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
    )
    seed = rng.getrandbits(64)
    sampling = replace(sampling, seed=seed)
    ask = Ask(
        name=f"ask-{number}",
        at_s=rng.uniform(0.0, span_s),
        prompt_ids=prompt,
        sampling=sampling,
        stop_strings=(),
        n=rng.choice((1, 1, 1, 2, 3)),
        seed=seed,
        priority=rng.choice((0, 0, 0, 1)),
        diagnostics=Diagnostics(
            max_chunk=rng.choice((0, 0, 1, 3)), preempt_at=rng.choice((None, None, None, rng.randrange(20)))
        ),
        habit=rng.choice(
            (Habit.READS,) * 6 + (Habit.CANCELS, Habit.VANISHES, Habit.SLOW, Habit.COMES_BACK, Habit.COMES_BACK)
        ),
        habit_at=rng.randint(0, 12),
        is_by_hand=rng.random() < 0.3,
        answers=(),
    )
    return _answered(replace(ask, stop_strings=_stop_strings(rng, ask, scheduler)), scheduler)


def _stop_strings(rng: random.Random, ask: Ask, scheduler: SchedulerConfig) -> tuple[str, ...]:
    """Some that are never found, and some that are: pieces of the answer without them."""
    if rng.random() < 0.6:
        return ()
    text = right_answer(ask.prompt_ids, ask.sampling, (), scheduler.context_limit).text
    start = rng.randrange(len(text) + 1)
    found = text[start : start + rng.randint(1, 3)]
    return tuple(stop for stop in (found, "zzzz", text[:1] + "zz") if stop)


def _answered(ask: Ask, scheduler: SchedulerConfig) -> Ask:
    answers = tuple(
        right_answer(
            ask.prompt_ids,
            replace(ask.sampling, seed=derive_seed(ask.seed, choice)),
            ask.stop_strings,
            scheduler.context_limit,
        )
        for choice in range(ask.n)
    )
    return replace(ask, answers=answers)


def _tainted(ask: Ask, token: int, scheduler: SchedulerConfig) -> Ask:
    """A request that does harm; long enough to come to it, and read to its end."""
    sampling = replace(ask.sampling, max_tokens=12, ignore_eos=True, stop_token_ids=(), prompt_logprobs=None)
    tainted = replace(
        ask, prompt_ids=(*ask.prompt_ids, token), sampling=sampling, stop_strings=(), n=1, habit=Habit.READS
    )
    return _answered(tainted, scheduler)


def _faults(rng: random.Random, asks: Sequence[Ask]) -> tuple[Fault, ...]:
    """Each while some request runs, or soon after another fault: while the cluster recovers from that."""
    times: list[float] = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
        if times and rng.random() < 0.5:
            times.append(times[-1] + rng.uniform(0.0, rng.choice((0.1, 2.0))))
        else:
            times.append(rng.choice(asks).at_s + rng.uniform(0.0, 0.25))
    return tuple(
        Fault(
            at_s=at_s,
            kind=rng.choice((*FaultKind, *[FaultKind.KILL_RANK] * 6)),
            target=rng.randrange(64),
            other=rng.randrange(64),
            for_s=rng.choice((0.05, 0.5, 5.0, 15.0)),
        )
        for at_s in sorted(times)
    )
