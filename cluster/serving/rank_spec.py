"""From the configuration to what a rank is built from."""

from __future__ import annotations

import os
from pathlib import Path

from moestro.cluster.config import Config
from moestro.cluster.serving.specs import threads_per_rank
from moestro.router.parallel import GroupShape
from moestro.router.rebalance.config import Config as RebalanceConfig
from moestro.workers.rank_setup import RankSpec
from moestro.workers.rebalancing.setup import ExpertsSpec


def rank_spec(config: Config) -> RankSpec:
    """What every rank of a group is built from."""
    cluster, scheduler, experts = config.cluster, config.scheduler, config.experts
    num_ranks = cluster.groups * cluster.dp * cluster.tp
    return RankSpec(
        model=str(config.model.path.resolve()),
        dtype=config.model.dtype,
        device=config.rank.device,
        kernels=config.rank.kernels,
        graphs=config.rank.graphs,
        threads=config.rank.threads or threads_per_rank(num_ranks, os.cpu_count() or 1),
        kv_bytes=config.rank.kv_memory,
        memory_bytes=config.rank.memory,
        ranks_per_host=num_ranks,
        shape=GroupShape(cluster.dp, cluster.tp),
        block_size=scheduler.block_size,
        max_num_sequences=scheduler.max_num_sequences,
        max_num_tokens=scheduler.max_num_tokens,
        max_context=scheduler.max_context,
        max_waiting=scheduler.max_waiting,
        watchdog_s=config.recovery.watchdog_s,
        experts=ExpertsSpec(
            redundant=experts.redundant,
            placement_file=str(Path(experts.placement).resolve()) if experts.placement else "",
            ranks_per_node=experts.ranks_per_node,
            transport=None if experts.transport == "auto" else experts.transport,
            rebalance=RebalanceConfig(
                enabled=experts.rebalance,
                window_s=experts.window_s,
                interval_s=experts.window_s,
                horizon_s=experts.horizon_s,
                settle_s=experts.window_s / 2,
                bytes_per_s=float(experts.load_rate),
            ),
        ),
    )
