"""Putting one rank together: group, model, cache, scheduler, loop.

Used by the Ray actor, by in-process engines and by tests alike: there is one way to build a rank.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from moestro.kernels.backend import NAMES as BACKEND_NAMES
from moestro.kernels.backend import Backend, BackendName
from moestro.kernels.choose import choose_backend
from moestro.protos.errors import ConfigError
from moestro.protos.sequences import EngineLimits, EngineLoad
from moestro.router.expert_parallel import ExpertParallel, over_group
from moestro.router.mesh import DeviceKind, Mesh, StoreAddress, join
from moestro.router.parallel import GroupShape
from moestro.router.placement import Placement
from moestro.router.transport import LocalTransport
from moestro.router.transports.by_call import ByCallTransport
from moestro.router.transports.choose import Problem, choose_transport
from moestro.workers.captured.setup import SPARE_BLOCKS, static_bytes, step_runner, usable_sizes
from moestro.workers.captured.sizes import graph_sizes
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
    graphs: int = 256  # sequences up to which a step of decodes is captured as a CUDA graph; 0: none
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
    backend = _backend(spec, torch.device(kind), dtype)
    load = partial(load_model, checkpoint, dtype=dtype, backend=backend, on_progress=on_progress)
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
        _agree(mesh, backend)
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


def _agree(mesh: Mesh, backend: Backend) -> None:
    """Backends differ from each other by rounding, so within a group an answer would depend on where its experts are.
    Collective. Raises ConfigError, on every rank, when the ranks' hosts have led to different ones."""
    mine = torch.tensor([BACKEND_NAMES.index(backend.name)])
    names = [BACKEND_NAMES[code] for code in mesh.control.all_gather(mine).flatten().tolist()]
    others = [rank for rank, name in enumerate(names) if name != names[0]]
    if others:
        raise ConfigError(
            f"rank.kernels: all ranks of a group must have the same, but rank 0 has {names[0]} and rank {others[0]} "
            f'{names[others[0]]}; "plain" can serve everywhere'
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
        captured_tokens=graph_sizes(_largest_graph(spec), spec.shape).largest if mesh.device.type == "cuda" else 0,
    )
    if isinstance(parallel.transport, ByCallTransport):
        largest = (spec.max_num_tokens,) * spec.shape.world_size
        problem = Problem(largest, model.top_k, model.hidden_size, dtype, placements[0].capacity)
        log.info("transport of the largest step: %s", choose_transport(problem, parallel.transport.deployment).reason)
    return parallel


def _backend(spec: RankSpec, device: torch.device, dtype: torch.dtype) -> Backend:
    """Raises ConfigError when what was asked for cannot serve."""
    try:
        chosen = choose_backend(device, dtype, spec.kernels)
    except ValueError as error:
        raise ConfigError(f"rank.{error}") from None
    log.info("kernels: %s, %s", chosen.backend.name, chosen.reason)
    return chosen.backend


def device_kind(wanted: str) -> DeviceKind:
    """auto: cuda where there is one. Raises ConfigError for cuda where there is none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("rank.device: cuda was asked for, but this machine has none")
    return "cuda" if wanted == "cuda" else "cpu"


def build_engine(spec: RankSpec, model: Decoder, device: torch.device) -> Engine:
    """Cache, scheduler and runner around a model. Collective in a group. Raises ConfigError when the KV pool holds no
    useful context."""
    config = scheduler_config(spec, model.cache_spec, model.config.max_position)
    sizes = usable_sizes(model, _largest_graph(spec), spec.shape)
    spare = SPARE_BLOCKS if sizes.rows else 0
    cache = model.cache_spec.allocate([group.num_blocks + spare for group in config.groups], spec.block_size)
    scheduler = Scheduler(config)
    limits = EngineLimits(
        model.config.vocab_size,
        scheduler.context_limit,
        spec.max_waiting,
        max_running=spec.max_num_sequences,
        max_tokens=config.pool_tokens,
    )
    num_columns = -(-scheduler.context_limit // spec.block_size)
    log.info(
        "memory of the device: %d bytes of cache, %d for the inputs and outputs of graphs",
        cache.num_bytes,
        static_bytes(sizes, model.config.vocab_size, num_columns, model.cache_spec.num_groups),
    )
    runner = step_runner(Runner(model, cache, device), model, sizes, num_columns, spec.shape)
    return Engine(scheduler, runner, limits)


def _largest_graph(spec: RankSpec) -> int:
    return min(spec.graphs, spec.max_num_sequences)


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
