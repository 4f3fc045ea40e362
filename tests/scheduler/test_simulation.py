"""Random lives of a scheduler over a model of the cache that remembers what was written where.

The model is the definition of a correct plan: before attention reads, every slot that a span may see must hold what
this very sequence would have written there. What a slot holds is named by everything that came before it, so a block
shared by mistake, freed too early or found under a wrong name cannot go unseen. The sampler is a function of the
prefix alone, so the tokens of a sequence are known beforehand, whatever happens to it on the way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from moestro.protos.errors import InvalidRequest, Overloaded
from moestro.protos.sequences import (
    Diagnostics,
    FinishReason,
    SampledToken,
    SamplingParams,
    SequenceDelta,
    SequenceRequest,
    TokenLogprobs,
)
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig
from moestro.workers.scheduler_sequence import StepPlan

VOCABULARY = 5
ROOT = 12345


def chain(token_ids: list[int] | tuple[int, ...]) -> list[int]:
    """For each position, a name of it and everything before it."""
    names, name = [], ROOT
    for token in token_ids:
        name = (name * 1_000_003 + token + 1) % (2**61 - 1)
        names.append(name)
    return names


def next_token(token_ids: list[int] | tuple[int, ...]) -> int:
    return chain(token_ids)[-1] % 7919 % VOCABULARY


def expected_output(request: SequenceRequest, context_limit: int) -> tuple[list[int], FinishReason]:
    """What the sequence must say, from the definitions of its parameters: the new tokens, and why it ends."""
    known, sampling = [*request.prompt_ids, *request.output_ids], request.sampling
    while True:
        num_before = len(known) - len(request.prompt_ids)
        token = next_token(known)
        known.append(token)
        new = known[len(request.prompt_ids) + len(request.output_ids) :]
        if num_before >= sampling.min_tokens:
            if token in sampling.eos_token_ids and not sampling.ignore_eos:
                return new, FinishReason.EOS
            if token in sampling.stop_token_ids:
                return new, FinishReason.STOP_TOKEN
        if num_before + 1 == sampling.max_tokens or len(known) == context_limit:
            return new, FinishReason.LENGTH


class CacheModel:
    """Keys and values of every slot of every group, as names of what they depend on."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.slots: list[dict[tuple[int, int], int]] = [{} for _ in config.groups]

    def run(self, plan: StepPlan) -> None:
        """All spans write, then all read, as the layers of a model do."""
        size = self.config.block_size
        names = [chain(span.sequence.token_ids) for span in plan.spans]
        for group, slots in enumerate(self.slots):
            written: set[tuple[int, int]] = set()
            for span, name in zip(plan.spans, names, strict=True):
                table = span.sequence.block_tables[group]
                for position in range(span.start, span.start + span.length):
                    slot = (table[position // size], position % size)
                    assert slot[0] != 0, f"{span} writes into the null block"
                    assert slot not in written, f"{span} writes where another does"
                    written.add(slot)
                    slots[slot] = name[position]
        for group, slots in enumerate(self.slots):
            window = self.config.groups[group].window
            for span, name in zip(plan.spans, names, strict=True):
                table = span.sequence.block_tables[group]
                first = 0 if window is None else max(0, span.start - window + 1)
                for position in range(first, span.start + span.length):
                    held = slots.get((table[position // size], position % size))
                    assert held == name[position], f"{span}: position {position} of group {group} holds another's"


@dataclass
class Life:
    """One scheduler, the cache beneath it, and what came out of it."""

    config: SchedulerConfig
    scheduler: Scheduler = field(init=False)
    cache: CacheModel = field(init=False)
    requests: dict[str, SequenceRequest] = field(default_factory=dict)
    deltas: dict[str, list[SequenceDelta]] = field(default_factory=dict)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.cache = CacheModel(self.config)

    def add(self, request: SequenceRequest) -> bool:
        """Whether it was taken in."""
        before = self.scheduler.load()
        try:
            self.scheduler.add(request, float(self.num_steps))
        except (InvalidRequest, Overloaded):
            assert self.scheduler.load() == before, "a refusal changed something"
            return False
        self.requests[request.sequence_id] = request
        self.deltas[request.sequence_id] = []
        return True

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(float(self.num_steps))
        self.scheduler.check_integrity()
        self.check_plan(plan)
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        lengths = [span.length for span in plan.spans]
        assert sum(lengths) == plan.num_tokens <= self.config.max_num_tokens
        assert len(lengths) <= self.config.max_num_sequences
        assert all(length == 1 for length in lengths[: plan.num_decodes])
        assert all(length > 1 for length in lengths[plan.num_decodes :])
        assert len({span.sequence.sequence_id for span in plan.spans}) == len(lengths)
        for span in plan.spans:
            most = self.requests[span.sequence.sequence_id].diagnostics.max_chunk
            assert not most or span.length <= most

    def finish(self, plan: StepPlan, failing: frozenset[str] = frozenset()) -> None:
        frozen = [(span, repr(span.sequence.token_ids), repr(span.sequence.block_tables)) for span in plan.spans]
        self.cache.run(plan)
        sampled, logprobs = {}, {}
        for sequence, start, length, samples in plan.spans:
            name = sequence.sequence_id
            if name in failing:
                sampled[name] = SampledToken(0, error="failed on purpose")
            elif samples:
                sampled[name] = SampledToken(next_token(sequence.token_ids))
            if sequence.wants_prompt_logprobs:
                following = sequence.token_ids[start + 1 : min(start + length + 1, sequence.num_prompt)]
                logprobs[name] = [TokenLogprobs(token, 0.0) for token in following]
        for span, token_ids, tables in frozen:
            assert (repr(span.sequence.token_ids), repr(span.sequence.block_tables)) == (token_ids, tables)
        self.num_steps += 1
        for delta in self.scheduler.apply(plan, sampled, float(self.num_steps), logprobs):
            self.deltas[delta.sequence_id].append(delta)
        self.scheduler.check_integrity()

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish(plan)
        return plan

    def run(self, max_steps: int = 5000) -> None:
        while self.scheduler.has_work:
            assert self.num_steps < max_steps, "no progress"
            self.step()
        assert self.scheduler.load().kv_blocks_used == 0
        assert self.scheduler.load().num_running == self.scheduler.load().num_waiting == 0

    def check_deltas(self, name: str) -> None:
        """The deltas of an undisturbed sequence are exactly what its definition says, ended once."""
        request, deltas = self.requests[name], self.deltas[name]
        tokens, reason = expected_output(request, self.scheduler.context_limit)
        assert [token for delta in deltas for token in delta.token_ids] == tokens
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [reason]
        assert [delta.ledger is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        wants = request.sampling.prompt_logprobs is not None and not request.output_ids
        joined = [delta.prompt_logprobs for delta in deltas]
        assert joined[1:] == [None] * (len(deltas) - 1)
        if wants:
            assert joined[0] is not None
            assert [p and p.token_id for p in joined[0]] == [None, *request.prompt_ids[1:]]
        else:
            assert joined[0] is None

    def check_preempted(self, name: str) -> None:
        """An undisturbed sequence that asked to be preempted was, if it had that many output tokens and then more."""
        request, ledger = self.requests[name], self.deltas[name][-1].ledger
        num_output = len(request.output_ids) + sum(len(delta.token_ids) for delta in self.deltas[name])
        preempt_at = request.diagnostics.preempt_at
        if preempt_at is not None and len(request.output_ids) < preempt_at < num_output:
            assert ledger is not None
            assert ledger.num_preemptions >= 1

    def check_ended(self, name: str, reason: FinishReason) -> None:
        """A disturbed sequence said a beginning of what it would have said, and ended once."""
        tokens, _ = expected_output(self.requests[name], self.scheduler.context_limit)
        said = [token for delta in self.deltas[name] for token in delta.token_ids]
        assert said == tokens[: len(said)]
        reasons = [delta.finish_reason for delta in self.deltas[name]]
        assert reasons == [None] * (len(reasons) - 1) + [reason]


def random_config(rng: random.Random, **fixed: object) -> SchedulerConfig:
    windows = rng.choice([(None,), (None,), (None, None), (rng.randint(1, 12),), (None, rng.randint(1, 12))])
    seqs = rng.randint(1, 8)
    config = SchedulerConfig(
        groups=tuple(CacheGroup(window, rng.randint(3, 30)) for window in windows),
        block_size=rng.choice([1, 2, 3, 4, 8]),
        max_num_sequences=seqs,
        max_num_tokens=seqs + rng.choice([0, 1, 3, 10, 50]),
        max_context=rng.randint(6, 60),
        max_waiting=rng.choice([3, 100]),
        admission=rng.choice(["continuous", "continuous", "static"]),
        reservation=rng.choice(["paged", "paged", "max_length"]),
    )
    return replace(config, **fixed)  # type: ignore[arg-type]


def random_request(rng: random.Random, name: str, stems: list[tuple[int, ...]]) -> SequenceRequest:
    """Few tokens and few stems, so that prefixes are often shared and block contents often coincide."""
    stem = rng.choice(stems)
    prompt = stem[: rng.randint(1, len(stem))] + tuple(rng.choices(range(VOCABULARY), k=rng.choice([0, 0, 1, 5])))
    sampling = SamplingParams(
        max_tokens=rng.randint(1, 30),
        min_tokens=rng.choice([0, 0, 3]),
        eos_token_ids=rng.choice([(), (), (0,)]),
        stop_token_ids=rng.choice([(), (), (1,)]),
        ignore_eos=rng.random() < 0.2,
        prompt_logprobs=rng.choice([None, None, None, 0]),
    )
    request = SequenceRequest(name, prompt, sampling, priority=rng.choice([0, 0, 0, 1, 2]))
    if rng.random() < 0.2:  # a replay
        tokens, _ = expected_output(request, 10**9)
        request = replace(request, output_ids=tuple(tokens[: rng.randrange(len(tokens))]))
    return request


def with_diagnostics(rng: random.Random, request: SequenceRequest) -> SequenceRequest:
    diagnostics = Diagnostics(
        max_chunk=rng.choice([0, 0, 1, 2, 7]), preempt_at=rng.choice([None, None, *range(6)]), trace=rng.random() < 0.5
    )
    return replace(request, diagnostics=diagnostics)


def random_stems(rng: random.Random) -> list[tuple[int, ...]]:
    return [tuple(rng.choices(range(VOCABULARY), k=rng.randint(1, 40))) for _ in range(3)]


@pytest.mark.parametrize("seed", range(250))
def test_any_life(seed: int) -> None:
    """Arrivals, cancels at any time, failed steps and failing sequences: nobody else notices."""
    rng = random.Random(seed)
    life = Life(random_config(rng))
    stems = random_stems(rng)
    disturbed: dict[str, FinishReason] = {}

    def disturb() -> None:
        alive = [
            n for n, deltas in life.deltas.items() if not (deltas and deltas[-1].finish_reason) and n not in disturbed
        ]
        if alive and rng.random() < 0.08:
            name = rng.choice(alive)
            assert life.scheduler.cancel(name)
            assert not life.scheduler.cancel(name)
            disturbed[name] = FinishReason.CANCELLED
            life.scheduler.check_integrity()

    for number in range(200):
        for _ in range(rng.choice([0, 0, 1, 2])):
            if number < 60:
                life.add(with_diagnostics(rng, random_request(rng, f"s{number}.{rng.random()}", stems)))
        disturb()
        plan = life.plan()
        disturb()
        if rng.random() < 0.03:
            life.scheduler.abandon(plan)
            life.scheduler.check_integrity()
            continue
        names = [span.sequence.sequence_id for span in plan.spans if not span.sequence.is_cancelled]
        failing = frozenset(name for name in names if rng.random() < 0.005)
        life.finish(plan, failing)
        disturbed.update(dict.fromkeys(failing, FinishReason.ERROR))
    life.run()
    for name in life.requests:
        if name in disturbed:
            life.check_ended(name, disturbed[name])
        else:
            life.check_deltas(name)
            life.check_preempted(name)


@pytest.mark.parametrize("seed", range(40))
def test_tokens_do_not_depend_on_budget_pool_or_policy(seed: int) -> None:
    """One set of sequences through four schedulers that chunk, preempt and share differently."""
    rng = random.Random(f"policy {seed}")
    stems = random_stems(rng)
    requests = [random_request(rng, f"s{i}", stems) for i in range(20)]
    for _ in range(4):
        config = random_config(rng, max_context=40, max_waiting=100)
        config = replace(config, groups=tuple(replace(g, num_blocks=g.num_blocks + 40) for g in config.groups))
        life = Life(config)
        taken = [request.sequence_id for request in requests if life.add(with_diagnostics(rng, request))]
        life.run()
        for name in taken:
            life.check_deltas(name)


@pytest.mark.parametrize("seed", range(40))
def test_nobody_starves(seed: int) -> None:
    """Among equals, the first in the order of service advances in every step and never gives way. So a sequence ends
    within as many steps as all before it, and itself, can have tokens; however many come after it."""
    rng = random.Random(f"starve {seed}")
    life = Life(random_config(rng, max_waiting=10**6))
    stems = random_stems(rng)
    due: dict[str, int] = {}
    ahead = 0
    for number in range(150):
        if number < 80:
            request = replace(random_request(rng, f"s{number}", stems), priority=0)
            if life.add(request):
                alive = [n for n in due if not life.deltas[n] or life.deltas[n][-1].finish_reason is None]
                ahead = sum(most_tokens(life, n) for n in [*alive, request.sequence_id])
                due[request.sequence_id] = life.num_steps + ahead
        life.step()
        for name, step in due.items():
            ended = bool(life.deltas[name]) and life.deltas[name][-1].finish_reason is not None
            assert ended or life.num_steps < step, f"{name} was due at step {step}"
    life.run()


def most_tokens(life: Life, name: str) -> int:
    request = life.requests[name]
    return min(len(request.prompt_ids) + request.sampling.max_tokens, life.scheduler.context_limit)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_in_order_advances_in_every_step(seed: int) -> None:
    """What liveness rests on, with priorities, scarce blocks and continuous admission."""
    rng = random.Random(f"first {seed}")
    life = Life(random_config(rng, max_waiting=10**6, admission="continuous"))
    stems = random_stems(rng)
    for number in range(60):
        life.add(random_request(rng, f"s{number}", stems))
        first = min(life.scheduler._running[:1] + life.scheduler._waiting[:1], key=lambda s: s.key, default=None)
        plan = life.step()
        assert first is None or first in [span.sequence for span in plan.spans]


@pytest.mark.parametrize("seed", range(20))
def test_replicas_plan_the_same(seed: int) -> None:
    """Peers that are fed the same calls make the same plans, whatever their clocks say."""
    rng = random.Random(f"replica {seed}")
    config, stems = random_config(rng), random_stems(rng)
    lives = [Life(config), Life(config)]
    lives[1].num_steps = 1000
    for number in range(80):
        request = random_request(rng, f"s{number}", stems)
        taken = [life.add(request) for life in lives]
        assert taken[0] == taken[1]
        plans = [life.step() for life in lives]
        views = [
            [(s.sequence.sequence_id, *s[1:], repr(s.sequence.block_tables)) for s in plan.spans] for plan in plans
        ]
        assert views[0] == views[1]


@pytest.mark.parametrize("seed", range(20))
def test_a_window_bounds_the_blocks_held(seed: int) -> None:
    """Between steps a windowed sequence holds no more blocks than its window can touch, however long it is."""
    rng = random.Random(f"window {seed}")
    size, window = rng.choice([1, 2, 4]), rng.randint(1, 12)
    config = SchedulerConfig((CacheGroup(window, 60),), size, 4, 4 + rng.randint(0, 30), 60, 100)
    life = Life(config)
    for number in range(8):
        life.add(SequenceRequest(f"s{number}", tuple(rng.choices(range(5), k=30)), SamplingParams(max_tokens=20)))
    while life.scheduler.has_work:
        life.step()
        most = -(-(window - 1) // size) + 1
        assert life.scheduler.load().kv_blocks_used <= most * life.scheduler.load().num_running
