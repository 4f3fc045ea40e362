"""A placement drawn from a seed: what nobody would choose, to show that no answer depends on the choice."""

from __future__ import annotations

import random

from moestro.router.placement import EMPTY, Placement


def random_placement(num_experts: int, num_ranks: int, capacity: int, seed: int | str) -> Placement:
    """Every expert somewhere, spare slots filled with replicas as far as no rank holds an expert twice, all in random
    order. Raises ValueError when ``capacity`` slots a rank cannot hold the experts."""
    if num_ranks * capacity < num_experts:
        raise ValueError(f"{num_ranks} ranks of {capacity} slots cannot hold {num_experts} experts")
    rng = random.Random(f"{seed}")
    homes = [rank for rank in range(num_ranks) for _ in range(capacity)]
    rng.shuffle(homes)
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert, rank in zip(range(num_experts), homes, strict=False):
        held[rank].append(expert)
    for experts in held:
        others = sorted(set(range(num_experts)) - set(experts))
        experts += rng.sample(others, min(len(others), capacity - len(experts)))
        experts += [EMPTY] * (capacity - len(experts))
        rng.shuffle(experts)
    return Placement(num_experts, tuple(map(tuple, held)))
