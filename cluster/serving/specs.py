"""What a rank asks Ray for. Imports no torch."""

from __future__ import annotations

from moestro.cluster.config import Config


def threads_per_rank(num_ranks: int, num_cores: int) -> int:
    """Cores shared evenly, at least one each: more threads than cores make every rank wait for the slowest."""
    return max(1, num_cores // num_ranks)


def gpus_per_rank(config: Config, cluster_gpus: float) -> float:
    """One where the cluster has any and the configuration does not say cpu."""
    return 1.0 if config.rank.device == "cuda" or (config.rank.device == "auto" and cluster_gpus >= 1) else 0.0


def rank_resources(config: Config, num_gpus: float) -> dict[str, float]:
    """As Ray's actor options name them."""
    return {"num_cpus": config.rank.num_cpus, "num_gpus": num_gpus}


def bundle(config: Config, num_gpus: float) -> dict[str, float]:
    """The same as a bundle of a placement group."""
    return {"CPU": config.rank.num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
