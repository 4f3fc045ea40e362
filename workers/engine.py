"""One rank's engine: add, cancel, step. Synchronous; whoever drives it owns the clock and the thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moestro.protos.errors import InvalidRequest, Overloaded
from moestro.protos.sequences import EngineLimits, EngineLoad, PositionTrace, SequenceDelta, SequenceRequest
from moestro.workers.runner import Launched, StepRunner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_sequence import StepPlan

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Engine:
    """A scheduler that decides and a runner that computes. The step is: plan, launch, collect."""

    scheduler: Scheduler
    runner: StepRunner
    limits: EngineLimits

    def add(self, request: SequenceRequest, now: float) -> str | None:
        """Takes a sequence on. Returns why not, when it can never fit or too many wait."""
        try:
            self.scheduler.add(request, now)
        except (InvalidRequest, Overloaded) as refusal:
            return str(refusal)
        return None

    def cancel(self, sequence_id: str) -> None:
        self.scheduler.cancel(sequence_id)

    def plan(self, now: float) -> StepPlan:
        return self.scheduler.plan(now)

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Launched:
        """Starts to compute a plan. Collective in a group: every rank runs its plan, an empty one too, and knows how
        many tokens each has planned."""
        return self.runner.launch(plan, num_tokens_N)

    def collect(self, plan: StepPlan, launched: Launched, clock: Clock) -> list[SequenceDelta]:
        """Waits for what was launched and applies what was drawn. The clock is read when the result is there."""
        result = launched.collect()
        deltas = self.scheduler.apply(plan, result.sampled, clock(), result.prompt_logprobs)
        return _with_traces(deltas, result.traces) if result.traces else deltas

    def abandon(self, plan: StepPlan) -> None:
        """The step failed: nothing it computed is kept, and its sequences wait to be computed again."""
        self.scheduler.abandon(plan)

    def run(self, plan: StepPlan, num_tokens_N: tuple[int, ...], clock: Clock) -> list[SequenceDelta]:
        """Launches and collects."""
        return self.collect(plan, self.launch(plan, num_tokens_N), clock)

    def skip(self, plan: StepPlan, now: float) -> list[SequenceDelta]:
        """Applies a plan without spans without computing anything: what was cancelled is reported."""
        return self.scheduler.apply(plan, {}, now)

    def step(self, clock: Clock) -> list[SequenceDelta]:
        """Plan and run, for an engine alone."""
        plan = self.plan(clock())
        return self.run(plan, (plan.num_tokens,), clock)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def load(self) -> EngineLoad:
        return self.scheduler.load()


def _with_traces(deltas: list[SequenceDelta], traces: Mapping[str, tuple[PositionTrace, ...]]) -> list[SequenceDelta]:
    """The traces with the deltas of their sequences. A chunk that gave no token has none; one is made for it."""
    silent = traces.keys() - {delta.sequence_id for delta in deltas}
    told = [delta._replace(trace=traces.get(delta.sequence_id, ())) for delta in deltas]
    return [*(SequenceDelta(name, trace=trace) for name, trace in traces.items() if name in silent), *told]
