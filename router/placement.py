"""Which rank holds which expert.

A *logical expert* is one of the checkpoint's; a *physical slot* is a place on a rank that holds one copy of a logical
expert. Slots are numbered over the whole group, rank after rank. Every expert has one slot today; one with several is
a replicated one, and a Placement already says so. (Logical experts and physical slots are EPLB's words.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """``slots[rank][i]`` is the logical expert in slot i of that rank.

    Ranks may hold unequal numbers of experts, or none. Raises ValueError if an expert has no slot, an id is out of
    range, or a rank holds two copies of one expert (the second could never be of use).
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for rank, experts in enumerate(self.slots):
            for expert in experts:
                if not 0 <= expert < self.num_experts:
                    raise ValueError(f"slots[{rank}]: expert must be in [0, {self.num_experts}), got {expert}")
            if len(set(experts)) != len(experts):
                raise ValueError(f"slots[{rank}]: an expert is placed twice on one rank: {experts}")
        homeless = set(range(self.num_experts)) - {expert for experts in self.slots for expert in experts}
        if homeless:
            raise ValueError(f"slots: no rank holds experts {sorted(homeless)}")

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def num_slots(self) -> int:
        return sum(len(experts) for experts in self.slots)

    @property
    def rank_of_slot(self) -> tuple[int, ...]:
        """By slot number: the rank it lies on."""
        return tuple(rank for rank, experts in enumerate(self.slots) for _ in experts)

    @property
    def slots_of_expert(self) -> tuple[tuple[int, ...], ...]:
        """By logical expert: the numbers of its slots, ascending, at least one."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(expert for experts in self.slots for expert in experts):
            found[expert].append(slot)
        return tuple(tuple(slots) for slots in found)

    def first_slot(self, rank: int) -> int:
        """The number of ``rank``'s first slot; its slots are ``first_slot(rank)`` up to ``first_slot(rank + 1)``."""
        return sum(len(experts) for experts in self.slots[:rank])


def spread(num_experts: int, num_ranks: int) -> Placement:
    """One copy of every expert, neighbours together, as evenly as whole experts allow."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    return Placement(num_experts, tuple(tuple(range(bounds[r], bounds[r + 1])) for r in range(num_ranks)))
