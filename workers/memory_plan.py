"""What a rank's memory can hold, and how many ranks a group can therefore lose.

When a rank is lost the others take in its experts. Everything else that they hold stays as it is, so all that counts is
how many slots for experts fit beside it, and that is known before anything happens.
"""

from __future__ import annotations

from dataclasses import dataclass

from moestro.protos.errors import ExpertsDoNotFit


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One rank's memory, in bytes."""

    limit: int  # that it may use in all
    fixed: int  # what is no expert: weights, cache, graphs, libraries
    slot: int  # of one expert in every mixture layer; 0 for a dense model

    @property
    def slots(self) -> int:
        """Experts of a layer that fit, in every layer; a dense model has none to fit."""
        return max(0, self.limit - self.fixed) // self.slot if self.slot else 0


def capacity_of(num_experts: int, redundant: int, num_ranks: int, most_slots: int) -> int:
    """Slots of a rank in a group of ``num_ranks``: as many as the experts and ``redundant`` more take, or what fits.

    Raises ExpertsDoNotFit when a rank's ``most_slots`` are fewer than its share of the experts."""
    least = -(-num_experts // num_ranks)
    if least > most_slots:
        raise ExpertsDoNotFit(
            f"{num_ranks} ranks are too few for {num_experts} experts a layer: each would have to hold {least}, and "
            f"has memory for {most_slots}"
        )
    return min(-(-(num_experts + redundant) // num_ranks), most_slots, num_experts)


def spare_ranks(num_experts: int, num_ranks: int, tp: int, most_slots: int) -> int:
    """How many ranks a group can lose before the rest cannot hold all experts; whole tensor-parallel sets. A dense
    model's ranks are all spare but for one set."""
    sets = num_ranks // tp
    fewest = next((left for left in range(1, sets + 1) if -(-num_experts // (left * tp)) <= most_slots), sets)
    return (sets - fewest) * tp
