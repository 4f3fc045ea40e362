"""Carries out a plan against a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

from moestro.cluster.bench.arrivals import ClosedLoop, Extent, OpenLoop, arrival_times
from moestro.cluster.bench.driver import OnRecord, RoundRun, run_closed, run_scheduled
from moestro.cluster.bench.hardware import hardware_record
from moestro.cluster.bench.metrics import Metrics, compute_metrics
from moestro.cluster.bench.plan import Plan
from moestro.cluster.bench.report import Report, Round, make_report
from moestro.cluster.bench.seeds import round_seed
from moestro.cluster.bench.target import Target, TargetInfo
from moestro.cluster.bench.workload import BenchRequest, Workload, check_context

# Called before a phase with its name ("warm-up", "round 1 of 3") and its number of requests (None: a duration ends it).
OnPhase = Callable[[str, int | None], None]
_WARMUP_AT_A_TIME = 4


async def run_plan(
    plan: Plan, target: Target, *, on_phase: OnPhase | None = None, on_record: OnRecord | None = None
) -> Report:
    """Every round in turn, each after its own warm-up. Raises ConfigError for a plan this target cannot serve and
    TargetError when nobody answers; failures of single requests are part of the report."""
    info = await target.describe()
    rounds = []
    for index in range(plan.rounds):
        seed = round_seed(plan.seed, index)
        workload = plan.workload(seed, info)
        warmup_errors = await _warm_up(plan, target, workload, on_phase)
        run = await _run_round(plan, target, workload, info, f"round {index + 1} of {plan.rounds}", on_phase, on_record)
        rounds.append(Round(index, seed, _metrics(plan, run), warmup_errors, run.records))
    return make_report(plan.settings(), info, hardware_record(), rounds)


async def _warm_up(plan: Plan, target: Target, workload: Workload, on_phase: OnPhase | None) -> dict[str, int]:
    """Failures by code; nothing else of a warm-up is kept."""
    if not plan.warmup:
        return {}
    if on_phase is not None:
        on_phase("warm-up", plan.warmup)
    # Numbers from far beyond any round, so that no measured prompt is met before.
    requests = [workload.request(2**31 + index) for index in range(plan.warmup)]
    at_a_time = plan.load.concurrency if isinstance(plan.load, ClosedLoop) else _WARMUP_AT_A_TIME
    run = await run_closed(target, requests, at_a_time, timeout_s=plan.timeout_s)
    return dict(Counter(r.error for r in run.records if r.error is not None))


async def _run_round(
    plan: Plan,
    target: Target,
    workload: Workload,
    info: TargetInfo,
    name: str,
    on_phase: OnPhase | None,
    on_record: OnRecord | None,
) -> RoundRun:
    load, extent = plan.load, plan.extent
    if isinstance(load, ClosedLoop):
        known = _prepare(workload, info, extent.num_requests) if extent.num_requests is not None else None
        requests = known if known is not None else (workload.request(index) for index in count())
        if on_phase is not None:
            on_phase(name, _total(extent))
        return await run_closed(
            target,
            requests,
            load.concurrency,
            timeout_s=plan.timeout_s,
            duration_s=extent.duration_s,
            on_record=on_record,
        )
    times_s = arrival_times(load, extent, workload.seed)
    prepared = _prepare(workload, info, len(times_s))
    if on_phase is not None:
        on_phase(name, len(times_s))
    return await run_scheduled(target, prepared, times_s, timeout_s=plan.timeout_s, on_record=on_record)


def _prepare(workload: Workload, info: TargetInfo, number: int) -> tuple[BenchRequest, ...]:
    """Makes the requests before the clock starts."""
    requests = tuple(workload.request(index) for index in range(number))
    if info.max_context is not None:
        check_context(requests, info.max_context)
    return requests


def _total(extent: Extent) -> int | None:
    return extent.num_requests if extent.duration_s is None else None


def _metrics(plan: Plan, run: RoundRun) -> Metrics:
    return compute_metrics(
        run.records,
        slo=plan.slo,
        asked_per_s=plan.load.rate if isinstance(plan.load, OpenLoop) else None,
        scheduled_load=not isinstance(plan.load, ClosedLoop),
        loop_delays_s=run.loop_delays_s,
        client_cpu_s=run.cpu_s,
    )
