"""Putting one rank together: group, model, cache, scheduler, loop.

Used by the Ray actor, by in-process engines and by tests alike: there is one way to build a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import time

import torch
from torch.distributed import TCPStore

from moestro.protos.sequences import EngineLimits
from moestro.router.all_to_all import AllToAllTransport
from moestro.router.mesh import Mesh, join
from moestro.router.parallel import GroupShape, NoTensorParallel, TensorParallel
from moestro.router.placement import spread
from moestro.router.transport import LocalTransport, Transport
from moestro.workers.checkpoint import Checkpoint
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.loading import load_model
from moestro.workers.lockstep import GroupLockstep, Lockstep, SoloLockstep
from moestro.workers.rank_loop import RankLoop
from moestro.workers.runner import Runner
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_config import CacheGroup, SchedulerConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What every rank of a group is built from; the same for all of them."""

    model: str  # checkpoint folder
    dtype: str = "auto"  # or bfloat16, float32
    device: str = "auto"  # or cpu, cuda
    threads: int = 0  # 0: torch's own choice
    kv_bytes: int = 256 * 2**20
    shape: GroupShape = GroupShape()
    block_size: int = 16
    max_num_sequences: int = 256
    max_num_tokens: int = 1024
    max_context: int = 0  # 0: the checkpoint's own
    max_waiting: int = 4096
