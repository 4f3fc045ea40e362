"""Which rank holds which expert.

A *logical expert* is one of the checkpoint's; a *physical slot* is a place on a rank that holds one copy of a logical
expert, or nothing. Every rank has the same number of slots, its *capacity*, and slots are numbered over the whole group
rank after rank: slot i of rank r is number ``r * capacity + i``. An expert in several slots is a replicated one.
(Logical experts and physical slots are EPLB's words.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Placement:
    """``slots[rank][i]`` is the logical expert in slot i of that rank, or EMPTY.

    Raises ValueError if an expert has no slot, an id is out of range, ranks differ in capacity, or a rank holds two
    copies of one expert (the second could never be of use).
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.slots):
            held = [expert for expert in experts if expert != EMPTY]
            for expert in held:
                if not 0 <= expert < self.num_experts:
                    raise ValueError(f"slots[{rank}]: expert must be in [0, {self.num_experts}), got {expert}")
            if len(set(held)) != len(held):
                raise ValueError(f"slots[{rank}]: an expert is placed twice on one rank: {experts}")
            if len(experts) != self.capacity:
                raise ValueError(f"slots[{rank}]: every rank has {self.capacity} slots, this one {len(experts)}")
        homeless = set(range(self.num_experts)) - {expert for experts in self.slots for expert in experts}
        if homeless:
            raise ValueError(f"slots: no rank holds experts {sorted(homeless)}")

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def capacity(self) -> int:
        """Slots of a rank."""
        return len(self.slots[0])

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.capacity

    @property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """By logical expert: the numbers of its slots, ascending, at least one."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(expert for experts in self.slots for expert in experts):
            if expert != EMPTY:
                found[expert].append(slot)
        return tuple(tuple(slots) for slots in found)


def spread(num_experts: int, num_ranks: int, capacity: int | None = None) -> Placement:
    """One copy of every expert, neighbours together, as evenly as whole experts allow; what is left of ``capacity`` (by
    default the least that holds them) stays empty."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    least = -(-num_experts // num_ranks)
    if capacity is not None and capacity < least:
        raise ValueError(
            f"capacity must be at least {least} to hold {num_experts} experts on {num_ranks} ranks, got {capacity}"
        )
    bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    held = [tuple(range(bounds[r], bounds[r + 1])) for r in range(num_ranks)]
    return Placement(num_experts, tuple(experts + (EMPTY,) * ((capacity or least) - len(experts)) for experts in held))


@dataclass(frozen=True, slots=True)
class Move:
    """An expert to be loaded: into slot ``slot`` of rank ``rank``."""

    rank: int
    slot: int
    expert: int


def moves(old: Placement, new: Placement) -> tuple[Move, ...]:
    """What must be loaded to turn one placement of a layer into another, by rank and slot. A slot that becomes empty
    loads nothing. Raises ValueError if they differ in experts, ranks or capacity."""
    for field in ("num_experts", "num_ranks", "capacity"):
        before, after = getattr(old, field), getattr(new, field)
        if before != after:
            raise ValueError(f"{field}: the new placement has {after}, the old one {before}")
    return tuple(
        Move(rank, slot, expert)
        for rank, (before, after) in enumerate(zip(old.slots, new.slots, strict=True))
        for slot, (left, expert) in enumerate(zip(before, after, strict=True))
        if expert not in (left, EMPTY)
    )


def moves_of_rank(steps: Iterable[Move], num_ranks: int) -> tuple[int, ...]:
    """By rank: how many experts it must load."""
    loaded = Counter(move.rank for move in steps)
    return tuple(loaded[rank] for rank in range(num_ranks))
