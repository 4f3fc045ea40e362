"""The whole configuration: one TOML file, one frozen tree, validated once.

Every field's description states what follows from its value; ``moestro config`` prints them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moestro.demo.paths import MODEL_DIR
from moestro.protos.errors import ConfigError

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(value: object) -> object:
    """``"512MiB"`` to a number of bytes; anything that is not such a string is left for pydantic to judge."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write for example 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Section(BaseModel):
    """A part of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    path: Path = Field(default=MODEL_DIR, description="Checkpoint folder in the Hugging Face layout.")
    name: str = Field(default="", description="Name clients see. Empty: the folder's name.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="Compute and storage type. auto: what the checkpoint's config.json says."
    )

    @property
    def served_name(self) -> str:
        return self.name or self.path.resolve().name


class ClusterConfig(Section):
    groups: int = Field(default=1, ge=1, le=1024, description="Copies of the model. More groups, more throughput.")
    dp: int = Field(
        default=2, ge=1, le=1024, description="Data-parallel ranks of a group; experts spread over all ranks."
    )
    tp: int = Field(default=1, ge=1, le=64, description="Ranks each attention layer is split over.")
    gateways: int = Field(
        default=1, ge=1, le=64, description="Gateway processes. Several on one host share the port (SO_REUSEPORT)."
    )
    ray_address: str = Field(
        default="", description="An existing Ray cluster (host:port or auto). Empty: start one here."
    )
    dashboard_port: int = Field(default=8265, ge=0, le=65535, description="Port of the Ray dashboard started here.")
    start_timeout_s: float = Field(default=600.0, gt=0, description="Give up when not serving after so long.")


class RankConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    kernels: Literal["auto", "plain", "cpu", "cuda"] = Field(
        default="auto", description="Whose operations compute (kernels/README.md). auto: the fastest that can."
    )
    graphs: int = Field(
        default=256,
        ge=0,
        le=8192,
        description="Largest batch whose decode step is a CUDA graph. 0: none.",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="Compute threads of a CPU rank. 0: cores shared evenly.")
    num_cpus: float = Field(default=1.0, ge=0, description="Ray CPUs a rank asks for in a cluster it did not start.")
    kv_memory: Bytes = Field(
        default=256 * 2**20, ge=2**20, description="Bytes of a rank's KV pool. Larger: more sequences at once."
    )
    memory: Bytes = Field(
        default=0,
        ge=0,
        description="Bytes a rank may use in all, on its device: how many lost ranks' experts it could take in. "
        "0: its share of what there is.",
    )


class SchedulerSection(Section):
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens per KV block.")
    max_num_sequences: int = Field(default=256, ge=1, le=65536, description="Sequences running at once on a rank.")
    max_num_tokens: int = Field(
        default=1024, ge=1, le=2**20, description="Tokens a step computes at most. Larger: faster prefill, longer gaps."
    )
    max_context: int = Field(
        default=0, ge=0, description="Longest prompt plus output. 0: the checkpoint's max_position_embeddings."
    )
    max_waiting: int = Field(
        default=4096, ge=0, description="Sequences that may wait on a rank; beyond it RESOURCE_EXHAUSTED."
    )


class ExpertsConfig(Section):
    redundant: int = Field(
        default=0,
        ge=0,
        le=65536,
        description="Slots of a group beyond one per expert, for replicas of hot ones. More: evener load, more memory.",
    )
    placement: str = Field(
        default="", description="Where experts lie at the start: a file of `moestro experts save`. Empty: in order."
    )
    ranks_per_node: int = Field(
        default=0, ge=0, le=1024, description="Ranks of a group on one node, which replicas prefer. 0: all of them."
    )
    transport: Literal["auto", "shared_memory", "all_to_all", "gather_scatter", "fixed_capacity", "deep_ep"] = Field(
        default="auto",
        description="How rows travel between ranks. auto: by the size of each step. One that cannot serve is refused.",
    )
    rebalance: bool = Field(default=True, description="Move experts while serving, where it pays.")
    window_s: float = Field(
        default=20.0, gt=0, le=86400, description="Traffic a decision looks at. Longer: calmer, later."
    )
    horizon_s: float = Field(
        default=600.0, gt=0, description="Time in which a move must pay for itself. Longer: costlier moves are made."
    )
    load_rate: Bytes = Field(
        default=256 * 10**6,
        ge=1000,
        description="Bytes of weights a rank loads per second while it serves. Less: gentler, slower to adapt.",
    )


class RecoveryConfig(Section):
    watchdog_s: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        description="A rank that neither steps nor answers for so long is taken for lost. 0: 3 on CPU, 30 on CUDA.",
    )
    replace: bool = Field(default=True, description="Start a new rank for each that was lost.")
    min_ranks: int = Field(
        default=1, ge=1, le=65536, description="A group with fewer ranks left drains and is replaced as a whole."
    )
    migrations: int = Field(
        default=3, ge=0, le=100, description="Times that a request goes on elsewhere; after that UNAVAILABLE."
    )
    patience_s: float = Field(
        default=60.0, ge=0, le=3600, description="How long a request that lost its rank waits for another."
    )
    resume_s: float = Field(
        default=60.0, ge=0, le=3600, description="How long a client that was cut off may come back for its stream."
    )
    max_parked: int = Field(
        default=1024, ge=0, le=2**20, description="Journals kept for clients that were cut off; the oldest go first."
    )


class AdmissionConfig(Section):
    max_queued: int = Field(
        default=1024, ge=0, le=2**20, description="Requests that wait at a gateway; beyond it RESOURCE_EXHAUSTED."
    )
    max_queued_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens, prompt and expected output, that wait at a gateway. 0: as many as its ranks hold.",
    )
    max_queue_s: float = Field(
        default=30.0,
        gt=0,
        le=86400,
        description="A request that would wait longer is refused at once; one let in waits twice as long at most.",
    )
    quantum: int = Field(
        default=512, ge=1, le=2**20, description="Tokens a client may start before it is the next one's turn."
    )
    stall_s: float = Field(
        default=30.0, gt=0, le=86400, description="A client that reads nothing for so long is cut off; it may resume."
    )
    max_unread_tokens: int = Field(
        default=4096,
        ge=1,
        le=2**24,
        description="Tokens held for a client that does not read; beyond it it is cut off.",
    )


class ServerConfig(Section):
    host: str = Field(default="127.0.0.1", description="Address the gateways listen on. 0.0.0.0: every interface.")
    port: int = Field(default=50051, ge=0, le=65535, description="gRPC port. 0: any free one.")
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of Prometheus metrics over HTTP, for example 9464. 0: none. Of several gateways on one host "
        "each takes the next free one.",
    )
    max_message_bytes: Bytes = Field(default=4 * 2**20, ge=2**10, description="Larger requests are refused.")
    max_open_requests: int = Field(
        default=4096, ge=1, description="Requests in flight at one gateway; beyond it RESOURCE_EXHAUSTED."
    )
    drain_s: float = Field(default=10.0, ge=0, description="Time open streams have to finish when the server stops.")


class Config(Section):
    """Everything ``moestro serve`` can be told."""

    model: ModelConfig = ModelConfig()
    cluster: ClusterConfig = ClusterConfig()
    rank: RankConfig = RankConfig()
    scheduler: SchedulerSection = SchedulerSection()
    experts: ExpertsConfig = ExpertsConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    admission: AdmissionConfig = AdmissionConfig()
    server: ServerConfig = ServerConfig()


def load_config(file: Path | None, overrides: dict[str, dict[str, Any]], base: Config | None = None) -> Config:
    """The configuration of ``file`` with command-line ``overrides`` laid over it. What neither names is as in ``base``,
    or the default.

    Raises ConfigError naming the file, and every wrong field with its bound and value.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not TOML: {error}") from None
    if base is not None:
        tree = _laid_over(base.model_dump(mode="json"), tree)
    for section, values in overrides.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given and isinstance(tree.setdefault(section, {}), dict):
            tree[section] |= given
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, issue['loc']))}: {issue['msg']} (got {_shorten(issue['input'])})"
            for issue in error.errors()
        ]
        source = str(file) if file is not None else "command line"
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; whatever is no section is left for validation to judge."""
    merged = dict(below)
    for name, section in above.items():
        known = below.get(name)
        merged[name] = known | section if isinstance(known, dict) and isinstance(section, dict) else section
    return merged


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
