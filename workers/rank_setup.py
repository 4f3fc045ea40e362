"""The parts of a rank: what a worker reads and allocates for itself, and what it computes with in a group.

``worker.py`` puts them together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from moestro.kernels.backend import Backend, BackendName
from moestro.kernels.choose import choose_backend
from moestro.protos.errors import ConfigError
from moestro.protos.sequences import EngineLimits
from moestro.router import board
from moestro.router.expert_parallel import ExpertParallel, over_group
from moestro.router.mesh import DeviceKind, Mesh
from moestro.router.parallel import GroupShape, TensorParallelSeat
from moestro.router.placement import Placement
from moestro.router.transport import LocalTransport
from moestro.router.transports.by_call import ByCallTransport
from moestro.router.transports.choose import Problem, choose_transport
from moestro.workers.captured.setup import SPARE_BLOCKS, static_bytes, step_runner, usable_sizes
from moestro.workers.captured.sizes import graph_sizes
from moestro.workers.checkpoint import Checkpoint, open_checkpoint
from moestro.workers.device import configure_torch
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import CacheSpec, KVCache
from moestro.workers.loading import OnProgress, open_source
from moestro.workers.loading import load_share as read_share
from moestro.workers.memory_use import most_slots
from moestro.workers.model.decoder import Decoder
from moestro.workers.model_config import ModelConfig
from moestro.workers.rebalancing.loader import OpenSource
from moestro.workers.rebalancing.setup import ExpertsSpec, start_placements
from moestro.workers.runner import Runner, StepRunner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

log = logging.getLogger(__name__)

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
    memory_bytes: int = 0  # that a rank may use in all, on its device; 0: its share of what there is
    ranks_per_host: int = 0  # that share a host's memory where ``memory_bytes`` is 0; 0: those of the group
    shape: GroupShape = field(default_factory=GroupShape)
    block_size: int = 16
    max_num_sequences: int = 256
    max_num_tokens: int = 1024
    max_context: int = 0  # 0: the checkpoint's own
    max_waiting: int = 4096
    graphs: int = 256  # sequences up to which a step of decodes is captured as a CUDA graph; 0: none
    experts: ExpertsSpec = field(default_factory=ExpertsSpec)
    watchdog_s: float = 0.0  # how long a rank waits for its peers in one collective; 0: 3 on CPUs, 30 on CUDA


@dataclass(frozen=True, slots=True)
class Share:
    """What a worker has read and allocated for itself: it outlives every group that the worker is in."""

    spec: RankSpec
    checkpoint: Checkpoint
    backend: Backend
    device: torch.device
    model: Decoder
    seat: TensorParallelSeat
    cache: KVCache
    limits: EngineLimits
    most_slots: int  # experts of a layer that fit in memory
    open_source: OpenSource

    def scheduler(self) -> Scheduler:
        """A new one, for a cache in which nothing is found."""
        return Scheduler(scheduler_config(self.spec, self.model.cache_spec, self.model.config.max_position))


def load_share(
    spec: RankSpec, seat: int, held: Sequence[Sequence[int]] | None = None, on_progress: OnProgress | None = None
) -> Share:
    """Reads the weights of a seat and allocates its cache, without a group. ``held``: by mixture layer the experts to
    read; None: those of this seat in the group at full strength.

    Raises CheckpointError, and ConfigError when the checkpoint, the shape and the KV pool do not fit together."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    kind = device_kind(spec.device)
    configure_torch(kind)
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)
    if kind == "cpu" and spec.shape.world_size > 1:
        board.prepare()
    checkpoint = open_checkpoint(spec.model)
    dtype = _DTYPES[spec.dtype] or checkpoint.config.dtype
    backend = _backend(spec, device, dtype)
    if held is None:
        placements = start_placements(spec.experts, checkpoint.config, spec.shape.world_size)
        held = [placement.slots[seat] for placement in placements]
    place = TensorParallelSeat(spec.shape.tp_rank(seat), spec.shape.tp)
    model = read_share(checkpoint, held, dtype=dtype, device=device, backend=backend, tp=place, on_progress=on_progress)
    cache, limits = _cache(spec, model)
    sharers = spec.ranks_per_host or spec.shape.world_size
    most = most_slots(model, device, cache.num_bytes, spec.memory_bytes, sharers)
    source = partial(open_source, checkpoint, dtype, device)
    return Share(spec, checkpoint, backend, device, model, place, cache, limits, most, source)


def _cache(spec: RankSpec, model: Decoder) -> tuple[KVCache, EngineLimits]:
    """Raises ConfigError when the KV pool holds no useful context."""
    config = scheduler_config(spec, model.cache_spec, model.config.max_position)
    spare = SPARE_BLOCKS if usable_sizes(model, _largest_graph(spec), spec.shape).rows else 0
    cache = model.cache_spec.allocate([group.num_blocks + spare for group in config.groups], spec.block_size)
    log.info("memory of the device: %d bytes of cache", cache.num_bytes)
    limits = EngineLimits(
        model.config.vocab_size,
        config.context_limit,
        spec.max_waiting,
        max_running=spec.max_num_sequences,
        max_tokens=config.pool_tokens,
    )
    return cache, limits


def runner_over(
    spec: RankSpec, model: Decoder, cache: KVCache, limits: EngineLimits, shape: GroupShape, device: torch.device
) -> StepRunner:
    """Computes the steps of a model in a group of ``shape``. Collective in a group: steps may be captured."""
    sizes = usable_sizes(model, _largest_graph(spec), shape)
    num_columns = -(-limits.max_context // spec.block_size)
    log.info(
        "memory of the device: %d bytes for the inputs and outputs of graphs",
        static_bytes(sizes, model.config.vocab_size, num_columns, model.cache_spec.num_groups),
    )
    return step_runner(Runner(model, cache, device), model, sizes, num_columns, shape)


def build_engine(spec: RankSpec, model: Decoder, device: torch.device) -> Engine:
    """Cache, scheduler and runner around a model that is in its group. Collective in a group. Raises ConfigError when
    the KV pool holds no useful context."""
    cache, limits = _cache(spec, model)
    scheduler = Scheduler(scheduler_config(spec, model.cache_spec, model.config.max_position))
    return Engine(scheduler, runner_over(spec, model, cache, limits, spec.shape, device), limits)


def spread_over(
    mesh: Mesh, spec: RankSpec, model: ModelConfig, dtype: torch.dtype, node_of_rank: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> ExpertParallel:  # fmt: skip
    """Experts over the ranks of ``mesh``. Raises ConfigError when the transport that was asked for cannot serve the
    largest step."""
    if mesh.shape.world_size == 1:
        return ExpertParallel(LocalTransport(placements[0].capacity if placements else 0), placements)
    parallel = over_group(
        mesh,
        placements,
        node_of_rank=node_of_rank,
        transport=spec.experts.transport,
        deep_ep_tokens=spec.max_num_tokens,
        captured_tokens=graph_sizes(_largest_graph(spec), mesh.shape).largest if mesh.device.type == "cuda" else 0,
    )
    if isinstance(parallel.transport, ByCallTransport):
        largest = (spec.max_num_tokens,) * mesh.shape.world_size
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
