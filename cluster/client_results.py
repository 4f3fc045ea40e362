"""What servers and clusters say of themselves, as plain data. The results of a generation are in ``edge.events``."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.protos.experts import ExpertsReport
from moestro.protos.experts_wire import decode_report
from moestro.protos.gen import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model that is served."""

    name: str
    architecture: str
    max_context: int
    vocab_size: int
    dtype: str
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The gateway that answered."""

    version: str
    uptime_s: float
    max_message_bytes: int
    max_waiting: int
    max_open_requests: int


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank as of its last step."""

    name: str
    dp_rank: int
    tp_rank: int
    state: str  # "starting", "serving" or "lost"
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    num_steps: int
    step_s: float
    resident_bytes: int
    device: str


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One copy of the model."""

    name: str
    dp: int
    tp: int
    epoch: int
    ranks: tuple[RankStatus, ...]


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All groups, and of the gateway that answered the open streams, and how many of them have not been started."""

    groups: tuple[GroupStatus, ...]
    open_streams: int
    queued_requests: int = 0


@dataclass(frozen=True, slots=True)
class GroupExperts:
    """The experts of one group."""

    name: str
    epoch: int
    report: ExpertsReport


def model_info(m: pb.Model) -> ModelInfo:
    return ModelInfo(m.name, m.architecture, m.max_context, m.vocab_size, m.dtype, m.has_chat_template)


def server_info(m: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(m.version, m.uptime_seconds, m.max_message_bytes, m.max_waiting, m.max_open_requests)


def cluster_status(message: pb.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        groups=tuple(
            GroupStatus(group.name, group.dp, group.tp, group.epoch, tuple(map(_rank, group.ranks)))
            for group in message.groups
        ),
        open_streams=message.open_streams,
        queued_requests=message.queued_requests,
    )


def _rank(m: pb.Rank) -> RankStatus:
    return RankStatus(
        name=m.name,
        dp_rank=m.dp_rank,
        tp_rank=m.tp_rank,
        state=pb.RankState.Name(m.state).removeprefix("RANK_STATE_").lower(),
        num_running=m.num_running,
        num_waiting=m.num_waiting,
        kv_blocks_used=m.kv_blocks_used,
        kv_blocks_total=m.kv_blocks_total,
        num_steps=m.num_steps,
        step_s=m.step_seconds,
        resident_bytes=m.resident_bytes,
        device=m.device,
    )


def group_experts(message: pb.GetExpertsResponse) -> tuple[GroupExperts, ...]:
    return tuple(GroupExperts(group.group, group.epoch, decode_report(group)) for group in message.groups)
