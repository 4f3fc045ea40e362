"""Decides which experts move when, while the group serves.

A deterministic state machine: no clock, threads, I/O or torch. Every rank runs its own, all are told the same things at
the same steps, and so all ask for the same things at the same steps; no rank coordinates. A layer's placement is always
either old or new, and nothing but ``placements`` has to survive when a machine is dropped.

The README draws the life of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moestro.router.placement import Placement
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.cost_model import Appraisal, excess_rows, measure, step_samples
from moestro.router.rebalance.evidence import Evidence
from moestro.router.rebalance.fit import FEWEST, Line, compare
from moestro.router.rebalance.ledger import Ledger, Outcome, Trigger
from moestro.router.rebalance.memory import Memory
from moestro.router.rebalance.messages import Drop, Intent, Ints, Observation, StartLoad, StartSolve, Switch
from moestro.router.rebalance.plan import Idle, Job, Moving, Phase, Plan, Settling, Solving, Trying
from moestro.router.rebalance.tables import tabulate
from moestro.router.rebalance.verdict import Moved, Verdict, judge


class Rebalancer:
    """``expert_bytes`` is the size of one expert's weights in one layer."""

    def __init__(self, config: Config, placements: Sequence[Placement], expert_bytes: int) -> None:
        if not placements:
            raise ValueError("placements must hold at least one mixture layer")
        if expert_bytes < 1:
            raise ValueError(f"expert_bytes must be at least 1, got {expert_bytes}")
        self.ledger = Ledger()
        self._config = config
        self._evidence = Evidence(config, tuple(placements), expert_bytes, self.ledger)
        self._paused = not config.enabled
        self._phase: Phase = Idle(-math.inf)
        self._tickets = 0
        self._solves = Memory(config.interval_s, doublings=3)  # with one subject, 0

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Those active now, by mixture layer."""
        return self._evidence.placements

    @property
    def loads_LE(self) -> Ints:
        """Rows by logical expert in the window; not to be written to."""
        return self._evidence.window.loads_LE

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def state(self) -> str:
        """idle, solving, trying, moving or settling."""
        return type(self._phase).__name__.lower()

    @property
    def gather_soon(self) -> bool:
        """A layer waits for the next observation in order to switch. A group without work should take one more round
        before it sleeps."""
        return isinstance(self._phase, Moving) and self._phase.job.ready

    def observe(self, seen: Observation, slowness: Sequence[float] = ()) -> tuple[Intent, ...]:
        """What all ranks did since the last call, and, where any is known to be slow, how many times longer each takes
        for the same work. Intents are to be started in order, before the next step."""
        self._evidence.slow(np.array(slowness or [1.0] * self.placements[0].num_ranks))
        self._evidence.observe(seen)
        if isinstance(self._phase, Moving):
            self._phase.job.add(seen)
        return tuple(self._advance())

    def solved(self, ticket: int, placements: Sequence[Placement]) -> None:
        """Every rank has finished that solve; this is what all of them found. Late answers are ignored."""
        if not isinstance(self._phase, Solving) or self._phase.ticket != ticket:
            return
        self._check(placements)
        if tuple(placements) == self.placements:
            self._solves.disappointed(0, self._phase.hope, self._evidence.now)
            self._refuse(Trigger.AUTO, "no better", "The solver knows no better placement.")
        else:
            plan = _plan(Trigger.AUTO, "Loads are uneven", placements, self._phase.since)
            plan.hope = self._phase.hope
            self._phase = Trying(plan)

    def ready(self, ticket: int) -> None:
        """Every rank has staged that load; the next observation answers with its switch. Late answers are ignored."""
        if isinstance(self._phase, Moving) and self._phase.job.ticket == ticket:
            self._phase.job.ready = True

    def failed(self, ticket: int, why: str) -> tuple[Intent, ...]:
        """Some rank could not solve or load. The plan ends there; layers that have switched stay."""
        match self._phase:
            case Solving(ticket=asked) if asked == ticket:
                self._refuse(Trigger.AUTO, "solver failed", f"The solver failed: {why}.")
            case Moving(plan=plan, job=job) if job.ticket == ticket:
                plan.queue.clear()
                self._cancel(plan, job, f"Loading failed: {why}.")
                self._finish(plan)
            case _:
                return ()
        return (Drop(ticket),)

    def request(
        self, placements: Sequence[Placement], reason: str, now: float, *, force: bool = True
    ) -> tuple[Intent, ...]:
        """An operator's placement of all layers. What is under way ends first: a layer that loads is dropped. With
        ``force`` it is carried out layer by layer whatever it gains, and left as it is; else it is tried, moved as far
        as it pays and judged like one of the machine's own. Raises ValueError for a placement of another model or
        group."""
        self._check(placements)
        intents = list(self._abandon(f"An operator's request came first: {reason}", now))
        self._evidence.cut()
        plan = _plan(Trigger.OPERATOR, reason, placements, self._evidence.now, forced=force)
        plan.queue = self._differing(plan)
        if not plan.queue:
            self._refuse(Trigger.OPERATOR, "in place", f"Already in place: {reason}.")
        elif force:
            intents += self._begin(plan)
        else:
            self._phase = Trying(plan)
        return tuple(intents)

    def pause(self, now: float) -> tuple[Intent, ...]:
        """No more decisions by itself. A plan of its own ends, a layer that loads is dropped; a request goes on."""
        self._paused = True
        match self._phase:
            case Trying(plan=plan) | Moving(plan=plan) | Settling(plan=plan) if plan.trigger is Trigger.OPERATOR:
                return ()
        return tuple(self._abandon("Automatic decisions were paused", now))

    def resume(self) -> None:
        self._paused = False

    # From phase to phase.

    def _advance(self) -> Iterator[Intent]:
        now = self._evidence.now
        match self._phase:
            case Idle(until=until) if now >= until and not self._paused:
                yield from self._look()
            case Trying(plan=plan) if now - plan.since >= self._config.window_s / 2:
                yield from self._try(plan)
            case Moving(plan=plan, job=job) if job.ready:
                yield from self._land(plan, job)
            case Settling(plan=plan, since=since) if now - since >= self._config.settle_s:
                yield from self._judge(plan, since)

    def _look(self) -> Iterator[Intent]:
        """Is there anything to gain? Asks for a solution only if there is."""
        buckets = tuple(self._evidence.window.closed)
        if math.fsum(bucket.seconds for bucket in buckets if bucket.tokens) < self._config.window_s / 2:
            return
        rates = measure(buckets)
        gain = rates.fraction(excess_rows(self._evidence.tables, buckets) * rates.s_per_row)
        if gain <= self._config.min_gain:
            self._refuse(
                Trigger.AUTO,
                "nothing to gain",
                f"Nothing to gain: even loads would save {max(0.0, gain):.1%} of the step time, {self._wanted}.",
            )
            return
        if self._solves.forbids(0, gain, self._evidence.now):
            self._refuse(
                Trigger.AUTO,
                "solved in vain",
                f"Even loads would save {gain:.1%} of the step time, but lately no plan for such a gain was worth it.",
            )
            return
        self._evidence.cut()
        self._phase = Solving(self._ticket(), self._evidence.now, gain)
        slowness = tuple(self._evidence.tables.slowness_R.tolist())
        yield StartSolve(self._phase.ticket, self.loads_LE, self.placements, slowness)

    def _try(self, plan: Plan) -> Iterator[Intent]:
        """Values a plan on traffic that it was not made for."""
        appraisals = self._evidence.appraise(plan, self._differing(plan))
        if not appraisals:
            self._refuse(plan.trigger, "too little traffic", "Too little traffic came to try a plan on.")
            return
        paying = [a for a in appraisals if a.pays]
        wanted = [a for a in paying if plan.trigger is Trigger.OPERATOR or self._evidence.allows(a)]
        rates = self._evidence.rates(plan)
        gain = rates.fraction(math.fsum(a.rate for a in wanted) * rates.wall_s)
        if gain < self._config.min_gain or not wanted:
            if plan.trigger is Trigger.AUTO:
                self._solves.disappointed(0, plan.hope, self._evidence.now)
            best = max(appraisals, key=lambda a: (a.saved_s - a.cost_s, -a.layer))
            self._refuse(
                plan.trigger,
                "would not pay",
                f"Of {len(appraisals)} layers {len(paying)} would pay, {len(paying) - len(wanted)} of which must wait: "
                f"their last move has not paid; the rest would save {gain:.1%} of the step time, {self._wanted}. The "
                f"best: {self._in_words(best)}.",
            )
            return
        self._solves.paid(0)
        wanted.sort(key=lambda a: (-a.saved_s / max(1, a.bytes), a.layer))
        plan.queue = [a.layer for a in wanted]
        yield from self._begin(plan)

    def _begin(self, plan: Plan) -> Iterator[Intent]:
        plan.before = self._evidence.quiet_steps()
        yield from self._next(plan, plan.before)

    def _next(self, plan: Plan, quiet: Line | None = None) -> Iterator[Intent]:
        """Starts to load the best layer left, passing over those that no longer pay. Only the first load of a
        plan can be compared with the ``quiet`` time before: later ones run beside steps that switches have changed."""
        while plan.queue:
            layer = plan.queue.pop(0)
            if plan.forced:
                price = self._evidence.price(layer, plan.placements[layer], 0.0)
                yield self._load(plan, price, plan.reason, None, quiet)
                return
            for appraisal in self._evidence.appraise(plan, [layer]):
                in_words = self._in_words(appraisal)
                if appraisal.pays:
                    yield self._load(plan, appraisal, f"{plan.reason}: {in_words}", appraisal.saved_s, quiet)
                    return
                self._refuse(plan.trigger, "no longer pays", f"No longer pays: {in_words}.")
        self._finish(plan)

    def _load(
        self, plan: Plan, appraisal: Appraisal, reason: str, predicted_s: float | None, quiet: Line | None
    ) -> StartLoad:
        entry = self.ledger.load(
            self._evidence.now,
            plan.trigger,
            appraisal.layer,
            f"{reason}.",
            bytes=appraisal.bytes,
            cost_s=appraisal.cost_s,
            predicted_s=predicted_s,
        )
        job = Job(self._ticket(), appraisal.layer, entry, appraisal.rate, appraisal.cost_s, quiet)
        self._phase = Moving(plan, job)
        return StartLoad(job.ticket, job.layer, plan.placements[job.layer], self._config.bytes_per_s)

    def _land(self, plan: Plan, job: Job) -> Iterator[Intent]:
        """A layer is staged everywhere: switches it if that still pays, its bytes being spent, and goes on."""
        self._evidence.loaded(job)
        horizon_s, stall_s = self._config.horizon_s, self._evidence.prices().stall_s
        worth = self._evidence.appraise(plan, [job.layer])
        if plan.forced or any(a.rate * horizon_s > stall_s for a in worth):
            yield Switch(job.ticket, job.layer, plan.placements[job.layer])
            self._evidence.switch(job, plan.placements[job.layer], judged=not plan.forced)
            self.ledger.switched(job.entry)
            if plan.forced:
                self.ledger.ended(job.entry, Outcome.KEPT)
            else:
                plan.moved.append(job.layer)
        else:
            yield Drop(job.ticket)
            self._cancel(plan, job, "The traffic that came while it loaded no longer makes it pay.")
        yield from self._next(plan)

    def _finish(self, plan: Plan) -> None:
        """No layer is left to move."""
        self._phase = Settling(plan, self._evidence.now) if plan.moved else self._idle()

    def _judge(self, plan: Plan, since: float) -> Iterator[Intent]:
        """Has the plan paid? Starts the way back for layers that did not and are better off there."""
        evidence = self._evidence
        evidence.cut()
        buckets = evidence.window.since(since)
        samples = step_samples(buckets)
        if len(samples) < FEWEST and evidence.now - since < self._config.settle_s + self._config.window_s:
            return
        change = compare(plan.before, samples) if plan.before else None
        lost = change.excess_s / measure(buckets).wall_s / len(plan.moved) if change else 0.0
        moved = []
        for layer in plan.moved:
            account = evidence.accounts[layer]
            rate = account.earned_s / (evidence.now - account.opened_at)
            by_rows, by_clock = (evidence.price(layer, account.previous, back) for back in (-rate, lost))
            moved.append(Moved(layer, rate, by_rows, by_clock))
        back = list(self.placements)
        undone = []
        for verdict in judge(moved, change, self._config.min_gain):
            previous = self._close(verdict)
            if verdict.undo:
                undone.append(verdict.layer)
                back[verdict.layer] = previous
        self._phase = self._idle()
        if undone:
            way_back = _plan(Trigger.UNDO, "Its move did not pay", back, evidence.now, forced=True)
            way_back.queue = undone
            yield from self._begin(way_back)

    def _close(self, verdict: Verdict) -> Placement:
        """Writes a verdict down; what the layer had before."""
        account = self._evidence.accounts[verdict.layer]
        outcome = Outcome.UNDONE if verdict.undo else Outcome.KEPT
        account.settled = True
        self.ledger.ended(account.entry, outcome, verdict.reason)
        if not verdict.paid:
            self._evidence.disappointed(verdict.layer, account.predicted_rate)
        return account.previous

    def _abandon(self, why: str, now: float) -> Iterator[Intent]:
        """Ends what is under way, between two switches."""
        self._evidence.now = max(self._evidence.now, now)
        match self._phase:
            case Solving(ticket=ticket):
                yield Drop(ticket)
            case Moving(plan=plan, job=job):
                self._cancel(plan, job, f"{why}.")
                self._leave_unjudged(plan, why)
                yield Drop(job.ticket)
            case Settling(plan=plan):
                self._leave_unjudged(plan, why)
        self._phase = self._idle()

    def _leave_unjudged(self, plan: Plan, why: str) -> None:
        for layer in plan.moved:
            account = self._evidence.accounts[layer]
            account.settled = True
            self.ledger.ended(account.entry, Outcome.KEPT, f"Not judged: {why}.")

    def _cancel(self, plan: Plan, job: Job, verdict: str) -> None:
        self.ledger.ended(job.entry, Outcome.CANCELLED, verdict)
        if plan.trigger is Trigger.AUTO:
            self._evidence.disappointed(job.layer, job.rate)

    def _refuse(self, trigger: Trigger, kind: str, reason: str) -> None:
        self.ledger.refuse(self._evidence.now, trigger, kind, reason)
        self._phase = self._idle()

    def _idle(self) -> Idle:
        return Idle(self._evidence.now + self._config.interval_s)

    # Small things.

    def _differing(self, plan: Plan) -> list[int]:
        return [layer for layer, new in enumerate(plan.placements) if new != self.placements[layer]]

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    @property
    def _wanted(self) -> str:
        return f"at least {self._config.min_gain:.1%} is wanted"

    def _in_words(self, appraisal: Appraisal) -> str:
        return (
            f"layer {appraisal.layer} would surely save {appraisal.saved_s:.3g} s over {self._config.horizon_s:g} s "
            f"and cost {appraisal.cost_s:.3g} s for {appraisal.bytes:,} bytes"
        )

    def _check(self, placements: Sequence[Placement]) -> None:
        if len(placements) != len(self.placements):
            raise ValueError(f"placements must hold {len(self.placements)} mixture layers, got {len(placements)}")
        for layer, (old, new) in enumerate(zip(self.placements, placements, strict=True)):
            for name in ("num_experts", "num_ranks", "capacity"):
                want, got = getattr(old, name), getattr(new, name)
                if got != want:
                    raise ValueError(f"placements[{layer}].{name} must be {want}, got {got}")


def _plan(
    trigger: Trigger, reason: str, placements: Sequence[Placement], since: float, *, forced: bool = False
) -> Plan:
    return Plan(trigger, reason, tuple(placements), tabulate(placements), since, forced)
