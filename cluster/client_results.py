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
    slowness: float = 1.0  # its time for the same work against the others', once it is named for that
    straggler: bool = False  # named: the others wait for it


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One copy of the model."""

    name: str
    dp: int
    tp: int
    epoch: int
    ranks: tuple[RankStatus, ...]
    activity: str = ""  # when it is not simply serving at full strength
    spare_ranks: int = 0  # how many more it could lose before the others cannot hold all experts


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


@dataclass(frozen=True, slots=True)
class Death:
    """A rank that died while a request ran there."""

    rank: str
    reason: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Incident:
    """A request that is not tried again, since a rank died each time it ran."""

    name: str
    age_s: float
    request_id: str
    model: str
    digest: str  # of prompt, parameters and seed
    prompt_tokens: int
    output_tokens: tuple[int, ...]  # by choice
    max_tokens: int
    seed: int
    sampling: dict[str, float]  # the other parameters, by name
    deaths: tuple[Death, ...]


def model_info(m: pb.Model) -> ModelInfo:
    return ModelInfo(m.name, m.architecture, m.max_context, m.vocab_size, m.dtype, m.has_chat_template)


def server_info(m: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(m.version, m.uptime_seconds, m.max_message_bytes, m.max_waiting, m.max_open_requests)


def cluster_status(message: pb.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        groups=tuple(
            GroupStatus(
                group.name,
                group.dp,
                group.tp,
                group.epoch,
                tuple(map(_rank, group.ranks)),
                group.activity,
                group.spare_ranks,
            )
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
        slowness=m.slowness or 1.0,
        straggler=m.straggler,
    )


def group_experts(message: pb.GetExpertsResponse) -> tuple[GroupExperts, ...]:
    return tuple(GroupExperts(group.group, group.epoch, decode_report(group)) for group in message.groups)


def incidents(message: pb.GetIncidentsResponse) -> tuple[Incident, ...]:
    return tuple(map(_incident, message.incidents))


def _incident(m: pb.Incident) -> Incident:
    sampling = {field.name: value for field, value in m.sampling.ListFields() if field.name != "seed"}
    return Incident(
        name=m.name,
        age_s=m.age_seconds,
        request_id=m.request_id,
        model=m.model,
        digest=m.digest,
        prompt_tokens=m.prompt_tokens,
        output_tokens=tuple(m.output_tokens),
        max_tokens=m.max_tokens,
        seed=m.sampling.seed,
        sampling=sampling,
        deaths=tuple(Death(death.rank, death.reason, death.age_seconds) for death in m.deaths),
    )
