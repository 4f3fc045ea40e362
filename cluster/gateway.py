"""A gateway: the edge, wired to the ranks of a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from moestro import __version__
from moestro.cluster.backend import Backend
from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits, ServedModel
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLoad

_STATES = {
    RankState.STARTING: pb.RANK_STATE_STARTING,
    RankState.SERVING: pb.RANK_STATE_SERVING,
    RankState.LOST: pb.RANK_STATE_LOST,
}


class Gateway:
    """Serves one model's cluster on one port. All methods on one asyncio loop."""

    def __init__(self, config: Config, secret: str, gateway_id: str) -> None:
        self._groups: tuple[GroupEntry, ...] = ()
        self._backend = ClusterBackend(gateway_id, secret)
        self._core = RequestCore([served_model(config, self._backend)], edge_limits(config))
        server = config.server
        self._server = GrpcServer(
            self._core,
            self._status,
            __version__,
            GrpcOptions(
                host=bracketed(server.host),
                port=server.port,
                reuse_port=config.cluster.gateways > 1,
                grace_s=server.drain_s,
            ),
        )

    def update(self, groups: Iterable[GroupEntry]) -> None:
        """Takes the directory's latest picture."""
        self._groups = tuple(groups)
        self._backend.update(self._groups)

    async def start(self) -> int:
        """Waits for a rank, then opens the port, which it returns."""
        await self._backend.wait_attached()
        return await self._server.start()

    async def stop(self) -> None:
        """Open streams may finish within the drain period."""
        await self._server.stop()
        await self._backend.close()

    async def _status(self) -> pb.GetClusterStatusResponse:
        loads = self._backend.loads()
        return pb.GetClusterStatusResponse(
            groups=[group_message(group, loads) for group in self._groups], open_streams=self._core.num_open
        )


def bracketed(host: str) -> str:
    """An IPv6 address as it is written before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def advertised(host: str, port: int, here: str) -> str:
    """host:port that a client can call: ``here`` stands for this machine when it listens on every interface."""
    return f"{bracketed(here if host in ('', '0.0.0.0', '::', '[::]') else host)}:{port}"


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
    return EdgeLimits(
        max_open_requests=config.server.max_open_requests, max_message_bytes=config.server.max_message_bytes
    )


def group_message(group: GroupEntry, loads: dict[str, EngineLoad]) -> pb.Group:
    message = pb.Group(name=group.name, dp=group.dp, tp=group.tp, epoch=group.epoch)
    for number, rank in enumerate(group.ranks):
        # A tensor-parallel peer does what its leader does, so the leader's load is its load too.
        leader = group.ranks[number - number % group.tp]
        load = loads.get(leader.address, EngineLoad())
        message.ranks.add(
            name=f"{group.name} rank {number}",
            dp_rank=rank.dp_rank,
            tp_rank=rank.tp_rank,
            state=_STATES[rank.state],
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_total=load.kv_blocks_total,
            num_steps=load.num_steps,
            step_seconds=load.step_s,
            resident_bytes=rank.resident_bytes,
            device=rank.device,
        )
    return message
