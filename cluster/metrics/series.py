"""What a gateway knows, as Prometheus series. The number of series grows with groups, ranks and layers, never with
experts: of each layer only the busiest and the least busy ones appear. The full matrix is ``moestro experts --json``.

Names follow https://prometheus.io/docs/practices/naming/: base units, ``_total`` on counters and on nothing else. What
covers a sliding window is a gauge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from moestro.cluster.client_results import ClusterStatus, GroupExperts, GroupStatus
from moestro.cluster.directory import GroupEntry
from moestro.cluster.metrics.recovery import recovery_series
from moestro.protos.experts import LayerExperts

EXTREMES = 3  # experts of a layer at either end
OUTCOMES = ("refused", "loading", "settling", "kept", "undone", "cancelled")

Samples = Iterable[tuple[tuple[str, ...], float]]  # label values and value


@dataclass(frozen=True, slots=True)
class EdgeObserved:
    """What a gateway does with those it does not serve at once; counts since its start."""

    queued_requests: int
    queued_tokens: int
    refused: Mapping[str, int]  # by reason; every reason there is
    queue_bounds_s: Sequence[float]
    queue_counts: Sequence[int]  # that waited at most so long; the last: all
    queue_total_s: float
    cut_off: int
    parked: int
    engine_losses: int
    resumed: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Observed:
    """One gateway and its cluster at one moment."""

    version: str
    open_requests: int
    edge: EdgeObserved
    status: ClusterStatus
    experts: tuple[GroupExperts, ...]  # of the groups that answered
    groups: tuple[GroupEntry, ...] = ()  # as the directory has them


def series(observed: Observed) -> Iterator[Metric]:
    """All families, each with the same labels and in the same order every time."""
    yield _gauge("moestro_build_info", "Always 1; the version is the label.", "version", [((observed.version,), 1)])
    yield _gauge("moestro_open_requests", "Requests open at this gateway.", "", [((), observed.open_requests)])
    yield from _edge_series(observed.edge)
    yield from _status_series(observed.status.groups)
    yield from recovery_series(observed.groups)
    yield from _expert_series(observed.experts)
    yield from _rebalancer_series(observed.experts)


def _edge_series(edge: EdgeObserved) -> Iterator[Metric]:
    yield _gauge("moestro_queued_requests", "Requests that wait to be started.", "", [((), edge.queued_requests)])
    yield _gauge("moestro_queued_tokens", "Their prompts and expected outputs.", "", [((), edge.queued_tokens)])
    refused = [((reason,), count) for reason, count in edge.refused.items()]
    yield _counter("moestro_refused_requests", "Requests refused for overload.", "reason", refused)
    bounds = [*map(str, edge.queue_bounds_s), "+Inf"]
    waited = HistogramMetricFamily("moestro_queue_seconds", "How long those that were started had to wait.")
    waited.add_metric([], list(zip(bounds, edge.queue_counts, strict=True)), edge.queue_total_s)
    yield waited
    yield _counter("moestro_cut_off_streams", "Streams cut off since nobody read them.", "", [((), edge.cut_off)])
    yield _gauge("moestro_parked_streams", "Streams remembered for clients that come back.", "", [((), edge.parked)])
    yield _counter("moestro_lost_runs", "Requests that lost the rank they ran on.", "", [((), edge.engine_losses)])
    yield _counter("moestro_resumed_streams", "Streams taken up again after a cut.", "", [((), edge.resumed)])
    yield _counter("moestro_quarantined_requests", "Requests that kill ranks.", "", [((), edge.quarantined)])


def extremes(load: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The busiest and the least busy experts: kind ("top", "bottom") and id. Equal ones by id."""
    experts = range(len(load))
    for expert in sorted(experts, key=lambda e: (-load[e], e))[:EXTREMES]:
        yield "top", expert
    for expert in sorted(experts, key=lambda e: (load[e], e))[:EXTREMES]:
        yield "bottom", expert


def _status_series(groups: Sequence[GroupStatus]) -> Iterator[Metric]:
    serving = [((g.name,), float(all(rank.state == "serving" for rank in g.ranks))) for g in groups]
    yield _gauge("moestro_group_serving", "1 while every rank of the group serves.", "group", serving)
    yield _gauge(
        "moestro_group_spare_ranks",
        "Ranks that the group can lose before the others cannot hold all experts.",
        "group",
        [((g.name,), g.spare_ranks) for g in groups],
    )
    ranks = [((g.name, str(number)), rank) for g in groups for number, rank in enumerate(g.ranks)]
    # A tensor-parallel peer repeats its leader's numbers: sums over ranks must count them once.
    leaders = [(labels, rank) for labels, rank in ranks if rank.tp_rank == 0]
    yield _gauge(
        "moestro_rank_running_sequences", "Sequences that run.", "group rank", [(x, r.num_running) for x, r in leaders]
    )
    yield _gauge(
        "moestro_rank_waiting_sequences", "Sequences that wait.", "group rank", [(x, r.num_waiting) for x, r in leaders]
    )
    yield _gauge(
        "moestro_rank_kv_blocks_used", "KV blocks in use.", "group rank", [(x, r.kv_blocks_used) for x, r in leaders]
    )
    yield _gauge(
        "moestro_rank_kv_blocks", "KV blocks there are.", "group rank", [(x, r.kv_blocks_total) for x, r in leaders]
    )
    yield _counter("moestro_rank_steps", "Engine steps.", "group rank", [(x, r.num_steps) for x, r in leaders])
    yield _gauge(
        "moestro_rank_last_step_seconds",
        "Duration of the last step.",
        "group rank",
        [(x, r.step_s) for x, r in leaders],
    )
    yield _gauge(
        "moestro_rank_slowness",
        "Time for the same work against the other ranks of the group, of a straggler; 1 for a rank that is none.",
        "group rank",
        [(x, r.slowness) for x, r in leaders],
    )
    yield _gauge(
        "moestro_rank_resident_memory_bytes",
        "Resident memory of the rank's process.",
        "group rank",
        [(x, r.resident_bytes) for x, r in ranks],
    )


def _expert_series(groups: Sequence[GroupExperts]) -> Iterator[Metric]:
    yield _gauge(
        "moestro_experts_window_seconds",
        "What the gauges of experts and layers cover.",
        "group",
        [((g.name,), g.report.window_s) for g in groups],
    )
    layers = [((g.name, str(layer.layer)), layer) for g in groups for layer in g.report.layers]
    yield _gauge(
        "moestro_expert_load",
        f"Rows of the {EXTREMES} busiest (top) and {EXTREMES} least busy (bottom) experts of a layer, over the window.",
        "group layer expert kind",
        [((*x, str(e), kind), layer.load[e]) for x, layer in layers for kind, e in extremes(layer.load)],
    )
    yield _gauge(
        "moestro_layer_balancedness",
        "Mean over maximum of the ranks' rows in a layer, over the window; 1 is even.",
        "group layer",
        [(x, layer.balancedness) for x, layer in layers],
    )
    yield _gauge(
        "moestro_layer_extra_replicas",
        "Copies of experts in a layer beyond the first of each.",
        "group layer",
        [(x, _extra_replicas(layer)) for x, layer in layers],
    )
    ranks = [((g.name, str(rank.rank)), rank) for g in groups for rank in g.report.ranks]
    yield _gauge(
        "moestro_rank_tokens",
        "Tokens of its own sequences put through the model, over the window.",
        "group rank",
        [(x, r.tokens) for x, r in ranks],
    )
    yield _gauge(
        "moestro_rank_expert_rows", "Rows computed, over the window.", "group rank", [(x, r.rows) for x, r in ranks]
    )
    yield _gauge(
        "moestro_rank_expert_seconds",
        "Time in expert products, over the window.",
        "group rank",
        [(x, r.expert_s) for x, r in ranks],
    )
    yield _gauge(
        "moestro_rank_wait_seconds",
        "Time waited for rows and results of other ranks, over the window.",
        "group rank",
        [(x, r.wait_s) for x, r in ranks],
    )
    observations = {g.name: sum(rank.num_slowest for rank in g.report.ranks) for g in groups}
    yield _gauge(
        "moestro_rank_slowest_ratio",
        "Share of observations in which the others waited for this rank, over the window.",
        "group rank",
        [(x, r.num_slowest / (observations[x[0]] or 1)) for x, r in ranks],
    )


def _rebalancer_series(groups: Sequence[GroupExperts]) -> Iterator[Metric]:
    states = [((g.name,), g.report.rebalancer) for g in groups]
    yield _gauge(
        "moestro_rebalancer_enabled", "1 while it acts by itself.", "group", [(x, s.enabled) for x, s in states]
    )
    yield _counter(
        "moestro_rebalancer_moved_bytes", "Weights loaded for moves.", "group", [(x, s.moved_bytes) for x, s in states]
    )
    yield _counter(
        "moestro_rebalancer_switched_layers",
        "Layers switched to a new placement.",
        "group",
        [(x, s.switched_layers) for x, s in states],
    )
    yield _counter(
        "moestro_rebalancer_undone_layers",
        "Layers moved back because the move did not pay.",
        "group",
        [(x, s.undone_layers) for x, s in states],
    )
    yield _gauge(
        "moestro_rebalancer_decisions",
        "Decisions in the ledger, which forgets the oldest, by what came of them.",
        "group outcome",
        [sample for g in groups for sample in _decisions(g)],
    )


def _decisions(group: GroupExperts) -> Samples:
    counts: Counter[str] = Counter()
    for decision in group.report.decisions:
        counts[decision.outcome] += decision.times
    return [((group.name, outcome), counts[outcome]) for outcome in OUTCOMES]


def _extra_replicas(layer: LayerExperts) -> int:
    return sum(expert >= 0 for slots in layer.slots for expert in slots) - len(layer.load)


def _gauge(name: str, text: str, labels: str, samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels.split()), samples)


def _counter(name: str, text: str, labels: str, samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels.split()), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for values, value in samples:
        family.add_metric(values, value)
    return family
