"""A gateway: the edge, wired to the ranks of a cluster."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import replace

from moestro import __version__
from moestro.cluster.backend import Backend
from moestro.cluster.client_results import cluster_status, group_experts
from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits, RecoveryLimits, ServedModel
from moestro.cluster.edge.tickets import AdmissionLimits, Refusal
from moestro.cluster.memory_reader import MemoryReader
from moestro.cluster.memory_watch import watch_memory
from moestro.cluster.metrics.series import EdgeObserved, Observed
from moestro.cluster.metrics.server import MetricsServer
from moestro.cluster.operations import ClusterOperations
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream
from moestro.protos.errors import MoestroError
from moestro.protos.gen import inference_pb2 as pb

log = logging.getLogger(__name__)


class Gateway:
    """Serves one model's cluster on one port. All methods on one asyncio loop."""

    def __init__(self, config: Config, secret: str, gateway_id: str) -> None:
        self._backend = ClusterBackend(gateway_id, secret, gateways=config.cluster.gateways)
        self._operations = ClusterOperations(self._backend)
        self._core = RequestCore([served_model(config, self._backend)], edge_limits(config))
        (self._permits,) = self._core.permits.values()
        server = config.server
        self._server = GrpcServer(
            self._core,
            self._operations,
            __version__,
            GrpcOptions(
                host=bracketed(server.host),
                port=server.port,
                # While gateways are replaced there is one more of them on the port than there will be.
                reuse_port=server.port != 0,
                grace_s=server.drain_s,
                stall_s=config.admission.stall_s,
                max_unread_tokens=config.admission.max_unread_tokens,
            ),
        )
        self._memory: asyncio.Task[None] | None = None
        self._metrics = (
            MetricsServer(self._observe, server.host, metrics_ports(config)) if server.metrics_port else None
        )

    def update(self, groups: Iterable[GroupEntry]) -> None:
        """Takes the directory's latest picture."""
        picture = tuple(groups)
        self._operations.update(picture)
        self._backend.update(picture)

    def attached_groups(self) -> frozenset[str]:
        """To whose ranks there are connections."""
        return self._backend.attached_groups()

    async def start(self) -> int:
        """Waits for a rank, then opens the port, which it returns, and that of the metrics."""
        await self._backend.wait_attached()
        port = await self._server.start()
        self._memory = asyncio.create_task(watch_memory(MemoryReader(), self._permits.set_pressure))
        if self._metrics is not None:
            log.info("metrics on port %d", self._metrics.start())
        return port

    async def stop(self) -> None:
        """Open streams may finish within the drain period."""
        await self._server.stop()
        if self._metrics is not None:
            await self._metrics.stop()
        await self._backend.close()
        if self._memory is not None:
            self._memory.cancel()

    async def _observe(self) -> Observed:
        """What the metrics show. Without an answer from the ranks they are those of the gateway alone."""
        try:
            experts = group_experts(await self._operations.experts(pb.GetExpertsRequest()))
        except (MoestroError, TimeoutError):
            experts = ()
        status = cluster_status(await self._operations.status())
        return Observed(
            __version__, self._core.num_open, self._observe_edge(), status, experts, self._operations.groups
        )

    def _observe_edge(self) -> EdgeObserved:
        permits = self._permits
        queue_s = permits.counts.queue_s
        return EdgeObserved(
            queued_requests=permits.num_queued,
            queued_tokens=permits.queued_tokens,
            refused={reason.value: permits.counts.refused[reason] for reason in Refusal},
            queue_bounds_s=queue_s.bounds,
            queue_counts=queue_s.cumulative(),
            queue_total_s=queue_s.total,
            cut_off=self._server.slow.num_cut,
            parked=self._core.num_parked,
            engine_losses=self._core.recovery.num_losses,
            resumed=self._core.recovery.num_resumed,
            quarantined=self._core.recovery.num_quarantined,
        )


def bracketed(host: str) -> str:
    """An IPv6 address as it is written before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def advertised(host: str, port: int, here: str) -> str:
    """host:port that a client can call: ``here`` stands for this machine when it listens on every interface."""
    return f"{bracketed(here if host in ('', '0.0.0.0', '::', '[::]') else host)}:{port}"


def metrics_ports(config: Config) -> range:
    """The ports that the gateways of one host share out among themselves; one more while they are replaced."""
    first = config.server.metrics_port
    return range(first, min(first + config.cluster.gateways + 1, 2**16))


def served_model(config: Config, backend: Backend) -> ServedModel:
    """The configured checkpoint as the edge knows it. Raises CheckpointError when its text side is unusable."""
    text = replace(TextModel.load(config.model.path), name=config.model.served_name)
    checkpoint = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    return ServedModel(
        text=text,
        backend=backend,
        open_text=lambda prompt_ids, stop_strings: TextStream(text, prompt_ids, stop_strings),
        architecture=checkpoint["architectures"][0],
        dtype=config.model.dtype if config.model.dtype != "auto" else str(checkpoint.get("dtype", "float32")),
    )


def edge_limits(config: Config) -> EdgeLimits:
    recovery, admission = config.recovery, config.admission
    return EdgeLimits(
        max_open_requests=config.server.max_open_requests,
        max_message_bytes=config.server.max_message_bytes,
        recovery=RecoveryLimits(recovery.migrations, recovery.patience_s, recovery.resume_s, recovery.max_parked),
        admission=AdmissionLimits(
            max_queued=admission.max_queued,
            max_queued_tokens=admission.max_queued_tokens,
            max_queue_s=admission.max_queue_s,
            quantum=admission.quantum,
        ),
    )
