"""From logical experts to the physical slots that serve them.

Legend: T tokens, K experts per token, E logical experts.

Since a row's result does not depend on where it is computed, the choice among replicas is free: it may follow the load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.router.placement import Placement


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement as one rank's device sees it. Build with ``lay_out``."""

    placement: Placement
    rank: int
    slot_E: Tensor  # int64: the slot that serves each logical expert

    @property
    def local_experts(self) -> tuple[int, ...]:
        """By local slot: its logical expert, or EMPTY."""
        return self.placement.slots[self.rank]


def lay_out(placement: Placement, rank: int, device: torch.device | str) -> Layout:
    """The tables that ``assign`` reads, on ``device``. Raises ValueError for a rank that the placement lacks."""
    if not 0 <= rank < placement.num_ranks:
        raise ValueError(f"rank must be in [0, {placement.num_ranks}), got {rank}")
    slots = [slots[0] for slots in placement.slots_of_expert]
    return Layout(placement, rank, torch.tensor(slots, dtype=torch.int64, device=device))


def assign(ids_TK: Tensor, layout: Layout) -> Tensor:
    """slots_TK (int64): for every logical expert of every token the number of a slot that holds it. A pure function of
    the batch; never waits for the device."""
    return layout.slot_E[ids_TK]
