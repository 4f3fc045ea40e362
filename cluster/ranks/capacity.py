"""How much of a rank one gateway may use, from what the rank last said of itself."""

from __future__ import annotations

from collections.abc import Iterable

from moestro.cluster.backend import Capacity
from moestro.protos.sequences import EngineLimits, EngineLoad

LINE = 8  # one sequence waits in a rank for every so many that run, so that it never waits for a gateway


def rank_capacity(limits: EngineLimits, load: EngineLoad, ours: int, gateways: int = 1) -> Capacity:
    """Of a rank where ``ours`` sequences of this gateway are open: what the other gateways leave, at least an equal
    share, so that one that comes late gets its own while the others' requests end.

    A rank where somebody waits runs all it can, whatever its limits say: its keys and values are larger than they were
    estimated, or its steps are full of prompts."""
    if load.is_shedding:
        return Capacity(0, 0)
    there = load.num_running + load.num_waiting
    others = max(0, there - ours)
    seats = (load.num_running if load.num_waiting else limits.max_running) + max(1, limits.max_running // LINE)
    used = limits.max_tokens * load.kv_blocks_used // max(1, load.kv_blocks_total)
    tokens = limits.max_tokens + limits.max_tokens // LINE
    return Capacity(
        sequences=max(seats - others, seats // gateways),
        tokens=max(tokens - used * others // max(1, there), tokens // gateways),
    )


def joint(capacities: Iterable[Capacity]) -> Capacity:
    """Of several ranks together."""
    each = tuple(capacities)
    return Capacity(sum(c.sequences for c in each), sum(c.tokens for c in each))
