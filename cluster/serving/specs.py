"""What a rank asks Ray for. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moestro.cluster.config import Config

SHARED_CPUS = 0.001  # Ray wants to see a number above zero


def threads_per_rank(num_ranks: int, num_cores: int) -> int:
    """Cores shared evenly, at least one each: more threads than cores make every rank wait for the slowest."""
    return max(1, num_cores // num_ranks)


def gpus_per_rank(config: Config, cluster_gpus: float) -> float:
    """One where the cluster has any and the configuration does not say cpu."""
    return 1.0 if config.rank.device == "cuda" or (config.rank.device == "auto" and cluster_gpus >= 1) else 0.0


def cpus_per_rank(config: Config) -> float:
    """In a Ray cluster of our own next to nothing: ranks share the cores as our own thread counts say, and Ray must not
    refuse more ranks than cores, or the new group of a rolling update."""
    return config.rank.num_cpus if config.cluster.ray_address else SHARED_CPUS


def rank_resources(config: Config, num_gpus: float) -> dict[str, float]:
    """As Ray's actor options name them."""
    return {"num_cpus": cpus_per_rank(config), "num_gpus": num_gpus}


def bundle(config: Config, num_gpus: float) -> dict[str, float]:
    """The same as a bundle of a placement group."""
    return {"CPU": cpus_per_rank(config), **({"GPU": num_gpus} if num_gpus else {})}


def group_resources(config: Config, num_gpus: float) -> list[dict[str, float]]:
    """The bundles of a whole group: its own process, which waits for its ranks, then a rank each."""
    return [{"CPU": SHARED_CPUS}, *[bundle(config, num_gpus)] * (config.cluster.dp * config.cluster.tp)]


def has_room(bundles: list[dict[str, float]], available: dict[str, float]) -> bool:
    """Whether resources suffice, taken together: how they lie on the nodes is Ray's to find out."""
    names = {name for bundle in bundles for name in bundle}
    return all(sum(bundle.get(name, 0.0) for bundle in bundles) <= available.get(name, 0.0) for name in names)


def has_size(config: Config, replicas: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether, by deployment and state, all replicas run that are wanted and there are no others: Serve calls an
    application running while what has to go still drains."""
    wanted = {"Directory": 1, "Group": config.cluster.groups, "Gateway": config.cluster.gateways}
    present = {name: {state: count for state, count in each.items() if count} for name, each in replicas.items()}
    return present == {name: {"RUNNING": count} for name, count in wanted.items()}


def group_of_actor(name: str) -> str | None:
    """The group that a rank's actor belongs to, by the actor's name; None for other actors."""
    match = re.match(r"(group-\d+) rank ", name)
    return match[1] if match else None


def watchdog_s(config: Config, num_gpus: float) -> float:
    """How long a rank may neither step nor answer."""
    return config.recovery.watchdog_s or (30.0 if num_gpus else 3.0)
