"""Putting one rank together: group, model, cache, scheduler, loop.

Used by the Ray actor, by in-process engines and by tests alike: there is one way to build a rank.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from moestro.kernels.choose import BackendName, choose_backend
from moestro.protos.errors import ConfigError
from moestro.protos.sequences import EngineLimits, EngineLoad
from moestro.router.expert_parallel import ExpertParallel, over_group
from moestro.router.mesh import DeviceKind, Mesh, StoreAddress, join
from moestro.router.parallel import GroupShape
from moestro.router.placement import Placement
from moestro.router.transport import LocalTransport
from moestro.router.transports.by_call import ByCallTransport
from moestro.router.transports.choose import Problem, choose_transport
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.device import configure_torch
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import CacheSpec
from moestro.workers.loading import OnProgress, load_model, open_source
from moestro.workers.lockstep import Lockstep, SoloLockstep, make_lockstep
from moestro.workers.model.decoder import Decoder
from moestro.workers.model_config import ModelConfig
from moestro.workers.rank_loop import RankLoop
from moestro.workers.rebalancing.setup import ExpertsSpec, group_experts, start_placements, topology
from moestro.workers.runner import Runner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

log = logging.getLogger(__name__)

STORE_TIMEOUT_S = 60.0
_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What every rank of a group is built from; the same for all of them."""

    model: str  # checkpoint folder
    dtype: str = "auto"  # or bfloat16, float32
    device: str = "auto"  # or cpu, cuda
    kernels: BackendName = "auto"
    threads: int = 0  # 0: torch's own choice
    kv_bytes: int = 256 * 2**20
    shape: GroupShape = field(default_factory=GroupShape)
    block_size: int = 16
    max_num_sequences: int = 256
    max_num_tokens: int = 1024
    max_context: int = 0  # 0: the checkpoint's own
    max_waiting: int = 4096
    experts: ExpertsSpec = field(default_factory=ExpertsSpec)


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """One rank's place in its group, and where the group's members meet."""

    rank: int
    epoch: int
    store: StoreAddress
    hostname: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """A rank that is ready to run."""

    loop: RankLoop
    limits: EngineLimits
    load: EngineLoad  # before anything runs
    device: str
    mesh: Mesh | None  # None for a rank alone

    def close(self) -> None:
        """Leaves the group, after the loop has ended."""
        self.loop.close()
        if self.mesh is not None:
            self.mesh.close()


def build_rank(spec: RankSpec, place: GroupPlace | None = None, on_progress: OnProgress | None = None) -> BuiltRank:
    """Builds one rank; without a place it is alone. Collective in a group: every rank builds at the same time.

    Raises CheckpointError, and ConfigError when the checkpoint, the shape and the KV pool do not fit together.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    kind = device_kind(spec.device)
    configure_torch(kind)
    checkpoint = open_checkpoint(spec.model)
    dtype = _DTYPES[spec.dtype] or checkpoint.config.dtype
    placements = start_placements(spec.experts, checkpoint.config, spec.shape.world_size)
    chosen = choose_backend(torch.device(kind), dtype, spec.kernels)
    log.info("kernels: %s, %s", chosen.backend.name, chosen.reason)
    load = partial(load_model, checkpoint, dtype=dtype, backend=chosen.backend, on_progress=on_progress)
    mesh = None
    if place is None:
        if spec.shape.world_size != 1:
            raise ConfigError(f"a rank alone has dp 1 and tp 1, not {spec.shape.dp} and {spec.shape.tp}")
        device = torch.device(kind)
        parallel = ExpertParallel(LocalTransport(placements[0].capacity if placements else 0), placements)
        model = load(device=device, experts=parallel)
        lockstep: Lockstep = SoloLockstep()
    else:
        mesh = join(
            spec.shape,
            place.rank,
            place.store.connect(STORE_TIMEOUT_S),
            device_kind=kind,
            epoch=place.epoch,
            hostname=place.hostname,
        )
        device = mesh.device
        experts_over = _over_group(mesh, placements, spec, checkpoint.config, dtype)
        model = load(device=device, tp=mesh.tp, experts=experts_over)
        lockstep = make_lockstep(mesh, place.store)
    engine = build_engine(spec, model, device)
    experts = group_experts(
        spec.experts,
        model,
        lockstep,
        rank=0 if place is None else place.rank,
        open_source=partial(open_source, checkpoint, dtype, device),
    )
    return BuiltRank(
        RankLoop(engine, lockstep, experts, time.monotonic), engine.limits, engine.load(), str(device), mesh
    )


def _over_group(
    mesh: Mesh, placements: tuple[Placement, ...], spec: RankSpec, model: ModelConfig, dtype: torch.dtype
) -> ExpertParallel:
    """Raises ConfigError when the transport that was asked for cannot serve the largest step."""
    parallel = over_group(
        mesh,
        placements,
        node_of_rank=topology(spec.experts, spec.shape.world_size).node_of_rank,
        transport=spec.experts.transport,
        deep_ep_tokens=spec.max_num_tokens,
    )
    if isinstance(parallel.transport, ByCallTransport):
        largest = (spec.max_num_tokens,) * spec.shape.world_size
        problem = Problem(largest, model.top_k, model.hidden_size, dtype, placements[0].capacity)
        log.info("transport of the largest step: %s", choose_transport(problem, parallel.transport.deployment).reason)
    return parallel


def device_kind(wanted: str) -> DeviceKind:
    """auto: cuda where there is one. Raises ConfigError for cuda where there is none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("rank.device: cuda was asked for, but this machine has none")
    return "cuda" if wanted == "cuda" else "cpu"


def build_engine(spec: RankSpec, model: Decoder, device: torch.device) -> Engine:
    """Cache, scheduler and runner around a model. Raises ConfigError when the KV pool holds no useful context."""
    config = scheduler_config(spec, model.cache_spec, model.config.max_position)
    cache = model.cache_spec.allocate([group.num_blocks for group in config.groups], spec.block_size)
    scheduler = Scheduler(config)
    limits = EngineLimits(model.config.vocab_size, scheduler.context_limit, spec.max_waiting)
    return Engine(scheduler, Runner(model, cache, device), limits)


def scheduler_config(spec: RankSpec, cache: CacheSpec, model_context: int) -> SchedulerConfig:
    """Shares the KV pool's bytes over the cache groups, the same number of blocks each, and no more than can ever be
    in use. Raises ConfigError naming the field that does not fit."""
    max_context = min(spec.max_context or model_context, model_context)
    bytes_of_one_each = sum(cache.bytes_per_block(group, spec.block_size) for group in range(cache.num_groups))
    useful = spec.max_num_sequences * -(-max_context // spec.block_size) + 1
    num_blocks = min(spec.kv_bytes // bytes_of_one_each, useful)
    try:
        config = SchedulerConfig(
            groups=tuple(CacheGroup(window, num_blocks) for window in cache.windows),
            block_size=spec.block_size,
            max_num_sequences=spec.max_num_sequences,
            max_num_tokens=spec.max_num_tokens,
            max_context=max_context,
            max_waiting=spec.max_waiting,
        )
        config.validate()
    except ValueError as error:
        raise ConfigError(f"scheduler: {error}; rank.kv_memory is {spec.kv_bytes} bytes") from None
    return config
