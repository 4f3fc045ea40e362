"""Metrics as Prometheus reads them: over HTTP where it matters, always through its own parser."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from tests.cluster.expert_cluster import DENSE, RUNNING, SECRET, FakeGroup, report_of
from tests.cluster.servers import free_port

from moestro.cluster.client_results import ClusterStatus, GroupExperts, GroupStatus, RankStatus
from moestro.cluster.config import ClusterConfig, Config, ModelConfig, ServerConfig
from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.gateway import Gateway, metrics_ports
from moestro.cluster.membership_records import RecoveryTotals
from moestro.cluster.metrics.series import EXTREMES, OUTCOMES, EdgeObserved, Observed, extremes, series
from moestro.cluster.metrics.server import MetricsServer
from moestro.protos.errors import ConfigError
from moestro.protos.experts import ExpertsReport

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


EDGE = EdgeObserved(
    queued_requests=5,
    queued_tokens=600,
    refused={"full": 2, "wait": 3},
    queue_bounds_s=(0.1, 1.0),
    queue_counts=(10, 14, 15),
    queue_total_s=4.5,
    cut_off=1,
    parked=5,
    engine_losses=7,
    resumed=3,
    quarantined=2,
)


def rank_status(dp_rank: int, tp_rank: int, state: str = "serving") -> RankStatus:
    return RankStatus(f"g rank {tp_rank}", dp_rank, tp_rank, state, 3, 1, 5, 64, 128, 0.02, 2**30, "cpu")


def observed(*reports: ExpertsReport) -> Observed:
    groups = tuple(GroupStatus(f"g{i}", 1, 2, 1, (rank_status(0, 0), rank_status(0, 1))) for i in range(len(reports)))
    experts = tuple(GroupExperts(f"g{i}", 1, report) for i, report in enumerate(reports))
    return Observed("1.2.3", 7, EDGE, ClusterStatus(groups, 7), experts)


class Given(Collector):
    def __init__(self, seen: Observed) -> None:
        self.seen = seen

    def collect(self) -> list[Metric]:
        return list(series(self.seen))


def exposed(seen: Observed) -> str:
    registry = CollectorRegistry()
    registry.register(Given(seen))
    return generate_latest(registry).decode()


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: object) -> float:
    return samples[name, frozenset((key, str(each)) for key, each in labels.items())]


def test_the_number_of_series_does_not_grow_with_experts() -> None:
    counts = {num: len(samples_of(exposed(observed(report_of(num, 4, 5))))) for num in (8, 64, 512)}
    assert len(set(counts.values())) == 1, counts
    num_layers, num_ranks = 5, 4
    edge = 8 + len(EDGE.refused) + len(EDGE.queue_counts) + 2
    status, group, per_rank, per_layer = 2, 2 * 7 + 2 + 5 + len(OUTCOMES), 4, 2 * EXTREMES + 2
    assert counts[8] <= status + edge + group + per_rank * num_ranks + per_layer * num_layers


def test_values_are_those_of_the_report() -> None:
    report = report_of(8, 4, 3)
    samples = samples_of(exposed(observed(report)))
    layer = report.layers[1]
    assert value(samples, "moestro_open_requests") == 7
    assert value(samples, "moestro_build_info", version="1.2.3") == 1
    assert value(samples, "moestro_queued_requests") == 5
    assert value(samples, "moestro_queued_tokens") == 600
    assert value(samples, "moestro_refused_requests_total", reason="wait") == 3
    assert value(samples, "moestro_queue_seconds_bucket", le=1.0) == 14
    assert value(samples, "moestro_queue_seconds_count") == 15
    assert value(samples, "moestro_queue_seconds_sum") == 4.5
    assert value(samples, "moestro_cut_off_streams_total") == 1
    assert value(samples, "moestro_parked_streams") == 5
    assert value(samples, "moestro_lost_runs_total") == 7
    assert value(samples, "moestro_resumed_streams_total") == 3
    assert value(samples, "moestro_quarantined_requests_total") == 2
    assert value(samples, "moestro_expert_load", group="g0", layer=2, expert=1, kind="top") == max(layer.load)
    assert value(samples, "moestro_expert_load", group="g0", layer=2, expert=0, kind="bottom") == min(layer.load)
    assert value(samples, "moestro_layer_balancedness", group="g0", layer=2) == layer.balancedness
    assert value(samples, "moestro_layer_extra_replicas", group="g0", layer=2) == 1
    assert value(samples, "moestro_rank_expert_rows", group="g0", rank=3) == 4000
    assert value(samples, "moestro_rank_wait_seconds", group="g0", rank=3) == 1.5
    assert value(samples, "moestro_rank_slowest_ratio", group="g0", rank=3) == 0.4
    assert value(samples, "moestro_rebalancer_moved_bytes_total", group="g0") == 3 * 2**20
    assert value(samples, "moestro_rebalancer_decisions", group="g0", outcome="refused") == 4  # one, four times
    assert value(samples, "moestro_rebalancer_decisions", group="g0", outcome="undone") == 0
    assert value(samples, "moestro_rank_kv_blocks", group="g0", rank=0) == 64
    assert value(samples, "moestro_rank_steps_total", group="g0", rank=0) == 128


def test_tensor_parallel_peers_are_counted_once() -> None:
    samples = samples_of(exposed(observed(report_of(4))))
    running = {labels: n for (name, labels), n in samples.items() if name == "moestro_rank_running_sequences"}
    assert running == {frozenset({("group", "g0"), ("rank", "0")}): 3}
    assert value(samples, "moestro_rank_resident_memory_bytes", group="g0", rank=1) == 2**30


def test_a_group_that_does_not_serve_says_so_and_a_dense_one_has_no_layers() -> None:
    seen = observed(report_of(4), DENSE)
    lost = replace(seen.status.groups[0], ranks=(rank_status(0, 0), rank_status(0, 1, "lost")))
    seen = replace(seen, status=replace(seen.status, groups=(lost, seen.status.groups[1])), experts=seen.experts[1:])
    samples = samples_of(exposed(seen))
    assert value(samples, "moestro_group_serving", group="g0") == 0
    assert value(samples, "moestro_group_serving", group="g1") == 1
    names = {name for name, _ in samples}
    assert "moestro_layer_balancedness" not in names
    assert value(samples, "moestro_rank_slowest_ratio", group="g1", rank=0) == 0


def test_losses_and_recoveries_are_counted() -> None:
    totals = RecoveryTotals(losses=2, silent_s=0.25, recoveries=1, recovery_s=0.5, restorations=1, restoration_s=8.0)
    ranks = (RankEntry(0, 0, RankState.SERVING), RankEntry(1, 0, RankState.LOST))
    seen = replace(observed(), groups=(GroupEntry("g0", 2, 1, 7, ranks, recovery=totals),))
    samples = samples_of(exposed(seen))
    assert value(samples, "moestro_group_epoch", group="g0") == 7
    assert value(samples, "moestro_group_serving_ranks", group="g0") == 1
    assert value(samples, "moestro_group_lost_ranks_total", group="g0") == 2
    assert value(samples, "moestro_group_lost_ranks_silence_seconds_total", group="g0") == 0.25
    assert value(samples, "moestro_group_recoveries_total", group="g0") == 1
    assert value(samples, "moestro_group_recovery_seconds_total", group="g0") == 0.5
    assert value(samples, "moestro_group_restorations_total", group="g0") == 1
    assert value(samples, "moestro_group_restoration_seconds_total", group="g0") == 8.0


def test_extremes_are_the_extremes() -> None:
    load = (5, 9, 9, 0, 1, 7, 0)
    assert list(extremes(load)) == [("top", 1), ("top", 2), ("top", 5), ("bottom", 3), ("bottom", 6), ("bottom", 4)]
    assert list(extremes((4,))) == [("top", 0), ("bottom", 0)]


def test_names_keep_the_conventions() -> None:
    for family in series(observed(report_of(4))):
        assert family.name.startswith("moestro_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith("_total")  # prometheus_client adds it to counters, and to nothing else
        assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples)


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


def test_over_http_asked_once_a_second_on_the_loop() -> None:
    async def scenario() -> None:
        asked = []

        async def observe() -> Observed:
            asked.append(asyncio.get_running_loop())
            return observed(report_of(4))

        server = MetricsServer(observe, "127.0.0.1", [0])
        port = server.start()
        first, second = await asyncio.gather(*(asyncio.to_thread(scrape, port) for _ in range(2)))
        assert first == second == exposed(observed(report_of(4)))
        assert asked == [asyncio.get_running_loop()]
        await server.stop()
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(scrape, port)

    asyncio.run(scenario())


def test_gateways_of_one_host_take_a_port_each() -> None:
    async def scenario() -> None:
        async def observe() -> Observed:
            return observed()

        first = free_port()
        servers = [MetricsServer(observe, "127.0.0.1", range(first, first + 2)) for _ in range(3)]
        assert [server.start() for server in servers[:2]] == [first, first + 1]
        with pytest.raises(ConfigError, match=rf"server.metrics_port: no free port on 127.0.0.1 from {first} to"):
            servers[2].start()
        for server in servers:
            await server.stop()
        elsewhere = MetricsServer(observe, "192.0.2.1", [first])
        with pytest.raises(ConfigError, match=r"server.metrics_port: cannot listen on 192\.0\.2\.1"):
            elsewhere.start()

    asyncio.run(scenario())


def test_a_gateway_serves_them_when_told_to(checkpoint: Path) -> None:
    def config(port: int) -> Config:
        return Config(
            model=ModelConfig(path=checkpoint),
            server=ServerConfig(port=0, metrics_port=port),
            cluster=ClusterConfig(gateways=2),
        )

    assert ServerConfig().metrics_port == 0
    assert list(metrics_ports(config(9464))) == [9464, 9465, 9466]  # one more while gateways are replaced
    assert list(metrics_ports(config(65535))) == [65535]

    async def scenario() -> None:
        group = FakeGroup("group-0", report_of(8))
        async with group.serving() as rank:
            port = free_port()
            gateway = Gateway(config(port), SECRET, "gw")
            assert group.entry is not None
            gateway.update([group.entry])
            await gateway.start()
            samples = samples_of(await asyncio.to_thread(scrape, port))
            assert value(samples, "moestro_layer_extra_replicas", group="group-0", layer=1) == 1
            assert value(samples, "moestro_rank_running_sequences", group="group-0", rank=0) == RUNNING
            assert value(samples, "moestro_group_serving", group="group-0") == 1
            rank.fail("its engine died")
            await asyncio.sleep(1.1)  # what was seen is no longer fresh
            samples = samples_of(await asyncio.to_thread(scrape, port))
            assert "moestro_layer_extra_replicas" not in {name for name, _ in samples}
            assert value(samples, "moestro_open_requests") == 0
            await gateway.stop()

    asyncio.run(scenario())
