"""The experts of a simulated model: how many there are, and where they go in a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.rehome import rehome
from moestro.workers.memory_plan import capacity_of, spare_ranks


@dataclass(frozen=True, slots=True)
class Experts:
    """Of one group; ``to_hold`` by layer is what a worker reads before it joins."""

    num_experts: int
    num_layers: int
    redundant: int  # slots beyond one for each expert
    most_slots: int  # of a rank, by its memory
    to_hold: list[set[int]]

    def rehomed(self, held: Sequence[Sequence[Sequence[int]]]) -> tuple[Placement, ...]:
        """By layer, from what each rank holds of each."""
        capacity = capacity_of(self.num_experts, self.redundant, len(held), self.most_slots)
        return tuple(
            rehome([rank[layer] for rank in held], self.num_experts, capacity) for layer in range(self.num_layers)
        )

    def spare_ranks(self, num_ranks: int, tp: int) -> int:
        return spare_ranks(self.num_experts, num_ranks, tp, self.most_slots)

    def at_start(self, num_ranks: int, seat: int) -> Experts:
        """For a worker of a group that begins."""
        slots = spread(self.num_experts, num_ranks).slots[seat]
        return replace(self, to_hold=[set(slots) - {EMPTY} for _ in range(self.num_layers)])

    def for_newcomer(self, held: Sequence[Sequence[Sequence[int]]], rank: int) -> Experts:
        """For a worker that will have ``rank`` among others that hold something now."""
        placements = self.rehomed([*held[:rank], [[] for _ in range(self.num_layers)], *held[rank:]])
        return replace(self, to_hold=[set(placement.slots[rank]) - {EMPTY} for placement in placements])
