"""Where a layer's experts go when the ranks of a group change, from what each rank holds now.

What counts is what must be read, since until it is there the group stands still. An expert that some rank holds stays
where it is as far as slots allow: a maximum matching of experts to the ranks that hold them (Kuhn 1955, by augmenting
paths; a rank takes as many as it has slots) says how many can, and all others are read. A pure function: every rank
computes it for itself from the same numbers, and all agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from moestro.router.placement import EMPTY, Placement

Held = Sequence[Sequence[int]]
"""By rank what its slots hold: logical experts or EMPTY, in any number."""


def rehome(held: Held, num_experts: int, capacity: int, loads: Sequence[int] | None = None) -> Placement:
    """A placement of ``capacity`` slots a rank that has the fewest experts to be read. One that nobody keeps goes to
    the rank with the least load; ``loads`` are by expert, in any unit, and equal without it. Slots left over keep the
    replicas they have, the heaviest first; none is read. What stays on a rank stays in its slot, if it still has that
    slot: a placement that fits is returned as it is.

    Raises ValueError for an expert that is none, and when all slots together are fewer than the experts."""
    if len(held) * capacity < num_experts:
        raise ValueError(f"capacity: {len(held)} ranks of {capacity} slots cannot hold {num_experts} experts")
    holdings = [[expert for expert in dict.fromkeys(slots) if expert != EMPTY] for slots in held]
    for rank, experts in enumerate(holdings):
        if wrong := [expert for expert in experts if not 0 <= expert < num_experts]:
            raise ValueError(f"held[{rank}]: expert must be in [0, {num_experts}), got {wrong[0]}")
    weight_E = [1] * num_experts if loads is None else [load + 1 for load in loads]  # nothing is free of cost
    ranks_E = _ranks_by_expert(holdings, num_experts)
    home_E = _homes(ranks_E, len(held), capacity, weight_E)
    _take_in_(home_E, holdings, ranks_E, capacity, weight_E)
    kept = _with_replicas(home_E, holdings, ranks_E, capacity, weight_E)
    return Placement(num_experts, tuple(_in_slots(*pair, capacity) for pair in zip(held, kept, strict=True)))


def num_loads(held: Held, placement: Placement) -> tuple[int, ...]:
    """By rank how many experts it must read to come from what it holds to a placement."""
    return tuple(len(set(wanted) - set(slots) - {EMPTY}) for slots, wanted in zip(held, placement.slots, strict=True))


def _ranks_by_expert(holdings: Held, num_experts: int) -> list[list[int]]:
    ranks_E: list[list[int]] = [[] for _ in range(num_experts)]
    for rank, experts in enumerate(holdings):
        for expert in experts:
            ranks_E[expert].append(rank)
    return ranks_E


def _homes(
    ranks_E: Sequence[Sequence[int]], num_ranks: int, capacity: int, weight_E: Sequence[int]
) -> list[int | None]:
    """By expert one of the ranks that hold it, no rank more than ``capacity`` times, None for as few as possible."""
    home_E: list[int | None] = [None] * len(ranks_E)
    homes: list[set[int]] = [set() for _ in range(num_ranks)]
    load_R = [0] * num_ranks
    # Those with the least choice first, so that few paths are needed; of these the heavy ones.
    for expert in sorted(range(len(ranks_E)), key=lambda e: (len(ranks_E[e]), -weight_E[e], e)):
        free = [rank for rank in ranks_E[expert] if len(homes[rank]) < capacity]
        if free:
            path = [(expert, min(free, key=lambda r: (load_R[r], len(homes[r]), r)))]
        else:
            path = _augmenting_path(expert, ranks_E, homes, capacity)
        for moved, rank in path:
            before = home_E[moved]
            if before is not None:
                homes[before].remove(moved)
                load_R[before] -= weight_E[moved]
            homes[rank].add(moved)
            load_R[rank] += weight_E[moved]
            home_E[moved] = rank
    return home_E


def _augmenting_path(
    expert: int, ranks_E: Sequence[Sequence[int]], homes: Sequence[set[int]], capacity: int
) -> list[tuple[int, int]]:
    """Who must go where so that ``expert`` finds room, the last one first; nothing, if there is no way."""
    reached_by: dict[int, int] = {}  # rank: the expert that would come to it
    queue = deque([expert])
    while queue:
        moving = queue.popleft()
        for rank in ranks_E[moving]:
            if rank in reached_by:
                continue
            reached_by[rank] = moving
            if len(homes[rank]) < capacity:
                return _back_to(expert, rank, reached_by, homes)
            queue.extend(sorted(homes[rank]))
    return []


def _back_to(expert: int, rank: int, reached_by: dict[int, int], homes: Sequence[set[int]]) -> list[tuple[int, int]]:
    path = [(reached_by[rank], rank)]
    while path[-1][0] != expert:
        leaves = next(r for r, experts in enumerate(homes) if path[-1][0] in experts)
        path.append((reached_by[leaves], leaves))
    return path


def _take_in_(
    home_E: list[int | None], holdings: Held, ranks_E: Sequence[Sequence[int]], capacity: int, weight_E: Sequence[int]
) -> None:
    """Gives the homeless a home, the heaviest first, each on the rank with the least load."""
    free_R = [capacity - home_E.count(rank) for rank in range(len(holdings))]
    load_R = [sum(weight_E[e] / len(ranks_E[e]) for e in experts if home_E[e] is not None) for experts in holdings]
    homeless = [expert for expert, home in enumerate(home_E) if home is None]
    for expert in sorted(homeless, key=lambda e: (-weight_E[e], e)):
        rank = min((r for r, free in enumerate(free_R) if free), key=lambda r: (load_R[r], -free_R[r], r))
        home_E[expert] = rank
        free_R[rank] -= 1
        load_R[rank] += weight_E[expert]


def _with_replicas(
    home_E: Sequence[int | None],
    holdings: Held,
    ranks_E: Sequence[Sequence[int]],
    capacity: int,
    weight_E: Sequence[int],
) -> list[set[int]]:
    """By rank the experts it is to have: those whose home it is, and of what else it holds what still has room."""
    kept: list[set[int]] = []
    for rank, experts in enumerate(holdings):
        own = {expert for expert, home in enumerate(home_E) if home == rank}
        others = sorted(set(experts) - own, key=lambda e: (-weight_E[e] / len(ranks_E[e]), e))
        kept.append(own | set(others[: capacity - len(own)]))
    return kept


def _in_slots(slots: Sequence[int], experts: set[int], capacity: int) -> tuple[int, ...]:
    placed = [EMPTY] * capacity
    for slot, expert in enumerate(slots[:capacity]):
        if expert in experts and expert not in placed:
            placed[slot] = expert
    free = (slot for slot, expert in enumerate(placed) if expert == EMPTY)
    for slot, expert in zip(free, sorted(experts - set(placed)), strict=False):
        placed[slot] = expert
    return tuple(placed)
