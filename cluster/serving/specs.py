"""From the configuration to what a rank is told."""

from __future__ import annotations

import os

from moestro.cluster.config import Config
from moestro.router.parallel import GroupShape
from moestro.workers.rank_setup import RankSpec


def rank_spec(config: Config) -> RankSpec:
    """What every rank of a group is built from."""
    cluster, scheduler = config.cluster, config.scheduler
    return RankSpec(
        model=str(config.model.path.resolve()),
        dtype=config.model.dtype,
        device=config.rank.device,
        threads=config.rank.threads or threads_per_rank(cluster.groups * cluster.dp * cluster.tp, os.cpu_count() or 1),
        kv_bytes=config.rank.kv_memory,
        shape=GroupShape(cluster.dp, cluster.tp),
        block_size=scheduler.block_size,
        max_num_sequences=scheduler.max_num_sequences,
        max_num_tokens=scheduler.max_num_tokens,
        max_context=scheduler.max_context,
        max_waiting=scheduler.max_waiting,
    )


def threads_per_rank(num_ranks: int, num_cores: int) -> int:
    """Cores shared evenly, at least one each: more threads than cores make every rank wait for the slowest."""
    return max(1, num_cores // num_ranks)


def rank_resources(config: Config) -> dict[str, float]:
    """What a rank asks Ray for."""
    return {"num_cpus": config.rank.num_cpus, "num_gpus": 0.0 if config.rank.device == "cpu" else gpus_per_rank()}


def gpus_per_rank() -> float:
    """One where the driver's machine has CUDA, else none. Asked without starting CUDA in this process."""
    import torch

    return 1.0 if torch.cuda.device_count() else 0.0
