"""From logical experts to the physical slots that serve them.

Legend: T tokens, K experts per token, E logical experts, X most replicas of any expert.

Since a row's result does not depend on where it is computed, the choice among replicas is free: it may follow the load.
In each batch of a rank, the tokens of an expert with r replicas are dealt to these in turn, so that each gets 1/r of
them but for the rounding. The turn begins with what is cheapest to reach: the copy on the same rank, then those on the
same node, then the others. Sources without a copy of their own begin at different ones, because many small batches
would otherwise all choose the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.router.placement import Placement


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement as one rank's device sees it. Build with ``lay_out``."""

    placement: Placement
    rank: int
    slot_E: Tensor  # int64: the first choice of each logical expert
    turn_EX: Tensor  # int64: the slot for the n-th token of an expert, n from 1, at n mod its replicas
    replicas_E: Tensor  # int32

    @property
    def local_experts(self) -> tuple[int, ...]:
        """By local slot: its logical expert, or EMPTY."""
        return self.placement.slots[self.rank]

    @property
    def max_replicas(self) -> int:
        return self.turn_EX.shape[1]


def lay_out(
    placement: Placement, rank: int, device: torch.device | str, node_of_rank: Sequence[int] | None = None
) -> Layout:
    """The tables that ``assign`` reads, on ``device``. Without ``node_of_rank`` all ranks are on one node. Raises
    ValueError for a rank that the placement lacks, or nodes for another number of ranks."""
    if not 0 <= rank < placement.num_ranks:
        raise ValueError(f"rank must be in [0, {placement.num_ranks}), got {rank}")
    nodes = (0,) * placement.num_ranks if node_of_rank is None else tuple(node_of_rank)
    if len(nodes) != placement.num_ranks:
        raise ValueError(f"node_of_rank must have {placement.num_ranks} ranks, got {len(nodes)}")
    orders = [preference(slots, rank, placement.capacity, nodes) for slots in placement.slots_of_expert]
    most = max(map(len, orders))
    turns = [[order[(n - 1) % len(order)] for n in range(len(order))] + [0] * (most - len(order)) for order in orders]
    return Layout(
        placement,
        rank,
        torch.tensor([order[0] for order in orders], dtype=torch.int64, device=device),
        torch.tensor(turns, dtype=torch.int64, device=device),
        torch.tensor([len(order) for order in orders], dtype=torch.int32, device=device),
    )


def preference(slots: Sequence[int], rank: int, capacity: int, node_of_rank: Sequence[int]) -> list[int]:
    """One expert's slots in the order in which ``rank`` uses them: its own, those on its node, the others. Ranks that
    have the same choice (none of their own, on a node that has some or on one that has none) are numbered, and each
    starts as many slots further on."""
    ranks = [slot // capacity for slot in slots]
    nodes = [node_of_rank[r] for r in ranks]
    mine = node_of_rank[rank]
    own = [slot for slot, r in zip(slots, ranks, strict=True) if r == rank]
    near = [slot for slot, r, n in zip(slots, ranks, nodes, strict=True) if n == mine and r != rank]
    far = [slot for slot, n in zip(slots, nodes, strict=True) if n != mine]
    others = [r for r, n in enumerate(node_of_rank) if r not in ranks and (n == mine if near else n not in nodes)]
    return own + _rotate(near, _place(rank, others)) + _rotate(far, _place(rank, others))


def _place(rank: int, ranks: Sequence[int]) -> int:
    return ranks.index(rank) if rank in ranks else rank


def _rotate(slots: list[int], by: int) -> list[int]:
    start = by % len(slots) if slots else 0
    return slots[start:] + slots[:start]


def assign(ids_TK: Tensor, layout: Layout) -> Tensor:
    """slots_TK (int64): for every logical expert of every token the number of a slot that holds it. ``ids_TK`` is
    int64, and no token names an expert twice. A pure function of the batch, of fixed shape; never waits for the device.

    The n-th token of an expert gets the n-th slot in turn: the running number is a sum down the tokens."""
    if layout.max_replicas == 1 or ids_TK.shape[0] <= 1:
        return layout.slot_E[ids_TK]
    T, E = ids_TK.shape[0], layout.replicas_E.shape[0]
    chosen_TE = torch.zeros(T, E, dtype=torch.int32, device=ids_TK.device).scatter_(1, ids_TK, 1)
    nth_TK = chosen_TE.cumsum(0, dtype=torch.int32).gather(1, ids_TK)
    turn_TK = nth_TK.remainder_(layout.replicas_E[ids_TK])
    return layout.turn_EX[ids_TK, turn_TK]
