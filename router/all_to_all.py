"""Dispatch and combine over a process group.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, M tokens received, P (token, expert) pairs
received (in order of arrival), R rows for this rank's experts (the pairs, sorted by expert; R = P), L local slots,
E logical experts, B bytes of a wire row.

A token travels once to every rank that holds any of its experts, with the slots of all its K experts behind it; the
receiver finds its own pairs. Expert outputs travel back one row per pair and are summed at home in top-k order.

Ranks of a tensor-parallel set hold the same tokens. Each sends its own slice of them, and every rank of the set gets
all rows back: no expert computes a row twice, and no further collective is needed to reunite the set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from moestro.router.mesh import Collectives, Mesh
from moestro.router.parallel import GroupShape
from moestro.router.placement import Placement
from moestro.router.transport import Dispatched, weighted_sum

SLOT_BYTES = 4  # int32 on the wire


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    """What combine needs to bring the rows of one dispatch home."""

    return_P: Tensor  # into R: which row to send, in order of destination
    send_N: tuple[int, ...]  # rows to return to each rank
    receive_N: tuple[int, ...]  # rows each rank returns to this one
    position_TK: Tensor  # into the rows received: where (token, k) is


@dataclass(frozen=True, slots=True)
class AllToAllTransport:
    """Transport over a process group of ``shape``. Build with ``all_to_all``.

    Two collectives move the rows. A third, of N integers, tells the receivers how many tokens to expect, unless
    ``tokens_N`` says beforehand how many tokens each rank has and they are few: then every token goes to every rank.
    """

    shape: GroupShape
    world: Collectives
    placement: Placement
    slot_E: Tensor  # int64: the slot that serves each logical expert
    rank_E: Tensor  # int64: its rank
    eager_bytes: int
    tokens_N: tuple[int, ...] | None = None

    @property
    def local_experts(self) -> tuple[int, ...]:
        return self.placement.slots[self.world.rank]

    def for_step(self, tokens_per_rank: tuple[int, ...]) -> AllToAllTransport:
        """This transport for one step, in which every layer dispatches exactly ``tokens_per_rank[r]`` tokens on rank
        r. Every rank must pass the same numbers."""
        if len(tokens_per_rank) != self.shape.world_size:
            raise ValueError(f"tokens_per_rank must have {self.shape.world_size} entries, got {len(tokens_per_rank)}")
        return replace(self, tokens_N=tuple(tokens_per_rank))

    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor) -> tuple[Dispatched, AllToAllHandle]:
        num_tokens, k = topk_ids_TK.shape
        size, rank, tp = self.world.size, self.world.rank, self.shape.tp
        if self.tokens_N is not None and self.tokens_N[rank] != num_tokens:
            raise ValueError(f"this step has {self.tokens_N[rank]} tokens on rank {rank}, dispatch got {num_tokens}")
        dest_TK = self.rank_E[topk_ids_TK]

        wire_TB = torch.cat([x_TD.contiguous().view(torch.uint8), _as_bytes(self.slot_E[topk_ids_TK])], dim=1)
        start, stop = tp_slice(num_tokens, self.shape.tp_rank(rank), tp)
        if self._eager(wire_TB.shape[1]):
            assert self.tokens_N is not None
            sizes = [tp_slice(t, self.shape.tp_rank(r), tp) for r, t in enumerate(self.tokens_N)]
            outgoing = wire_TB[start:stop].repeat(size, 1)
            send, receive = [stop - start] * size, [hi - lo for lo, hi in sizes]
        else:
            # nonzero of the transpose is sorted by rank, then token: the order of sending.
            wanted_TN = torch.zeros(num_tokens, size, dtype=torch.bool, device=x_TD.device)
            wanted_TN[start:stop].scatter_(1, dest_TK[start:stop], True)
            outgoing = wire_TB[wanted_TN.T.nonzero()[:, 1]]
            send_N1 = wanted_TN.sum(0).unsqueeze(1)
            receive_N1 = self.world.all_to_all(send_N1, [1] * size, [1] * size)
            send, receive = torch.cat([send_N1, receive_N1], dim=1).T.tolist()
        wire_MB = self.world.all_to_all(outgoing, send, receive)

        width = x_TD.shape[1] * x_TD.element_size()
        first, num_local = self.placement.first_slot(rank), len(self.local_experts)
        local_MK = wire_MB[:, width:].contiguous().view(torch.int32).long() - first
        mine_MK = (local_MK >= 0) & (local_MK < num_local)
        token_P = mine_MK.nonzero()[:, 0]
        local_P = local_MK[mine_MK]
        order_R = torch.argsort(local_P, stable=True)
        x_RD = wire_MB[token_P[order_R], :width].view(x_TD.dtype)
        counts_L = torch.bincount(local_P, minlength=num_local)

        position_P = _inverse(order_R)
        # All tokens of one tensor-parallel set arrived next to each other; the whole stretch goes to each of its ranks.
        ends_S = torch.tensor(receive, device=x_TD.device).view(self.shape.dp, tp).sum(1).cumsum(0)
        pair_ends = [0, *torch.searchsorted(token_P, ends_S).tolist()]  # token_P ascends
        returned = [end - start for start, end in pairwise(pair_ends)]
        return_P = position_P
        if tp > 1:
            return_P = torch.cat([stretch for part in torch.split(position_P, returned) for stretch in [part] * tp])
        dest_R = dest_TK.reshape(-1)
        handle = AllToAllHandle(
            return_P=return_P,
            send_N=tuple(pairs for pairs in returned for _ in range(tp)),
            receive_N=tuple(torch.bincount(dest_R, minlength=size).tolist()),
            position_TK=_inverse(torch.argsort(dest_R, stable=True)).view(num_tokens, k),
        )
        return Dispatched(x_RD, counts_L), handle

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: AllToAllHandle) -> Tensor:
        rows = self.world.all_to_all(y_RD[handle.return_P], list(handle.send_N), list(handle.receive_N))
        return weighted_sum(rows[handle.position_TK], weights_TK)

    def _eager(self, row_bytes: int) -> bool:
        """Whether every token simply goes to every rank. Decided from what all ranks know, so that all agree."""
        return self.tokens_N is not None and sum(self.tokens_N) * row_bytes <= self.eager_bytes * self.shape.tp


def all_to_all(mesh: Mesh, placement: Placement, *, eager_bytes: int = 256 * 1024) -> AllToAllTransport:
    """The transport of a group whose experts lie as ``placement`` says (one copy of each: the first is used).

    ``eager_bytes`` bounds what a rank may receive in a step that skips the exchange of counts; 0 turns that off.
    """
    if placement.num_ranks != mesh.shape.world_size:
        raise ValueError(f"placement is for {placement.num_ranks} ranks, the group has {mesh.shape.world_size}")
    slots = [slots[0] for slots in placement.slots_of_expert]
    ranks = [placement.rank_of_slot[slot] for slot in slots]
    return AllToAllTransport(
        shape=mesh.shape,
        world=mesh.world,
        placement=placement,
        slot_E=torch.tensor(slots, dtype=torch.int64, device=mesh.device),
        rank_E=torch.tensor(ranks, dtype=torch.int64, device=mesh.device),
        eager_bytes=eager_bytes,
    )


def tp_slice(num_tokens: int, tp_rank: int, tp: int) -> tuple[int, int]:
    """The tokens [start, stop) that this rank of a tensor-parallel set sends for the set."""
    return num_tokens * tp_rank // tp, num_tokens * (tp_rank + 1) // tp


def _as_bytes(slots_TK: Tensor) -> Tensor:
    return slots_TK.to(torch.int32).contiguous().view(torch.uint8)


def _inverse(order: Tensor) -> Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return position
