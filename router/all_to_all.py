"""Dispatch and combine over a process group.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, M tokens received, P (token, expert) pairs
received (in order of arrival), R rows for this rank's experts (the pairs, sorted by expert; R = P), L local slots,
E logical experts, B bytes of a wire row.

A token travels once to every rank that holds any of its experts, with the slots of all its K experts behind it; the
receiver finds its own pairs. Expert outputs travel back one row per pair and are summed at home in top-k order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moestro.router.mesh import Collectives, Mesh
from moestro.router.placement import Placement
from moestro.router.transport import Dispatched, weighted_sum


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    """What combine needs to bring the rows of one dispatch home."""

    return_P: Tensor  # into R: which row to send, in order of destination
    send_N: tuple[int, ...]  # rows to return to each rank
    receive_N: tuple[int, ...]  # rows each rank returns to this one
    position_TK: Tensor  # into the rows received: where (token, k) is


@dataclass(frozen=True, slots=True)
class AllToAllTransport:
    """Transport over a process group. Build with ``all_to_all``.

    Two collectives move the rows; a third, of N integers, tells the receivers how many tokens to expect.
    """

    world: Collectives
    placement: Placement
    slot_E: Tensor  # int64: the slot that serves each logical expert
    rank_E: Tensor  # int64: its rank

    @property
    def local_experts(self) -> tuple[int, ...]:
        return self.placement.slots[self.world.rank]

    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor) -> tuple[Dispatched, AllToAllHandle]:
        num_tokens, k = topk_ids_TK.shape
        size = self.world.size
        dest_TK = self.rank_E[topk_ids_TK]
        wire_TB = torch.cat([x_TD.contiguous().view(torch.uint8), _as_bytes(self.slot_E[topk_ids_TK])], dim=1)
        wanted_TN = torch.zeros(num_tokens, size, dtype=torch.bool, device=x_TD.device).scatter_(1, dest_TK, True)
        send_N1 = wanted_TN.sum(0).unsqueeze(1)
        receive_N1 = self.world.all_to_all(send_N1, [1] * size, [1] * size)
        send, receive = torch.cat([send_N1, receive_N1], dim=1).T.tolist()
        # nonzero of the transpose is sorted by rank, then token: the order of sending.
        wire_MB = self.world.all_to_all(wire_TB[wanted_TN.T.nonzero()[:, 1]], send, receive)

        width = x_TD.shape[1] * x_TD.element_size()
        first, num_local = self.placement.first_slot(self.world.rank), len(self.local_experts)
        local_MK = wire_MB[:, width:].contiguous().view(torch.int32).long() - first
        mine_MK = (local_MK >= 0) & (local_MK < num_local)
        token_P = mine_MK.nonzero()[:, 0]
        local_P = local_MK[mine_MK]
        order_R = torch.argsort(local_P, stable=True)
        x_RD = wire_MB[token_P[order_R], :width].view(x_TD.dtype)
        counts_L = torch.bincount(local_P, minlength=num_local)

        position_P = _inverse(order_R)
        ends_N = torch.tensor(receive, device=x_TD.device).cumsum(0)
        pair_ends = [0, *torch.searchsorted(token_P, ends_N).tolist()]  # token_P ascends
        dest_R = dest_TK.reshape(-1)
        handle = AllToAllHandle(
            return_P=position_P,
            send_N=tuple(end - start for start, end in pairwise(pair_ends)),
            receive_N=tuple(torch.bincount(dest_R, minlength=size).tolist()),
            position_TK=_inverse(torch.argsort(dest_R, stable=True)).view(num_tokens, k),
        )
        return Dispatched(x_RD, counts_L), handle

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: AllToAllHandle) -> Tensor:
        rows = self.world.all_to_all(y_RD[handle.return_P], list(handle.send_N), list(handle.receive_N))
        return weighted_sum(rows[handle.position_TK], weights_TK)


def all_to_all(mesh: Mesh, placement: Placement) -> AllToAllTransport:
    """The transport of a group whose experts lie as ``placement`` says (one copy of each: the first is used)."""
    if placement.num_ranks != mesh.shape.world_size:
        raise ValueError(f"placement is for {placement.num_ranks} ranks, the group has {mesh.shape.world_size}")
    slots = [slots[0] for slots in placement.slots_of_expert]
    ranks = [placement.rank_of_slot[slot] for slot in slots]
    return AllToAllTransport(
        world=mesh.world,
        placement=placement,
        slot_E=torch.tensor(slots, dtype=torch.int64, device=mesh.device),
        rank_E=torch.tensor(ranks, dtype=torch.int64, device=mesh.device),
    )


def _as_bytes(slots_TK: Tensor) -> Tensor:
    return slots_TK.to(torch.int32).contiguous().view(torch.uint8)


def _inverse(order: Tensor) -> Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return position
