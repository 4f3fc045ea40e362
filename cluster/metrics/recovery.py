"""What groups have lost and got back, as Prometheus series. Seconds are sums: divide by the count beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moestro.cluster.directory import GroupEntry, RankState

COUNTERS = (
    ("moestro_group_lost_ranks", "Ranks that were lost.", "losses"),
    ("moestro_group_lost_ranks_silence_seconds", "From their last sign of life to the notice.", "silent_s"),
    ("moestro_group_recoveries", "Times that the ranks left after a loss came to serve.", "recoveries"),
    ("moestro_group_recovery_seconds", "From the notice of a loss until then.", "recovery_s"),
    ("moestro_group_restorations", "Times that full strength came back.", "restorations"),
    ("moestro_group_restoration_seconds", "From the notice of a loss until then.", "restoration_s"),
)


def recovery_series(groups: Sequence[GroupEntry]) -> Iterator[Metric]:
    """Families with one label, the group; the counters begin anew with a group that is replaced as a whole."""
    epochs = GaugeMetricFamily("moestro_group_epoch", "The epoch that the group serves in.", labels=["group"])
    serving = GaugeMetricFamily("moestro_group_serving_ranks", "Ranks that serve.", labels=["group"])
    for group in groups:
        epochs.add_metric([group.name], group.epoch)
        serving.add_metric([group.name], sum(rank.state is RankState.SERVING for rank in group.ranks))
    yield epochs
    yield serving
    for name, text, field in COUNTERS:
        family = CounterMetricFamily(name, text, labels=["group"])
        for group in groups:
            family.add_metric([group.name], getattr(group.recovery, field))
        yield family
