"""Dispatch and combine over a process group.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, M tokens received, P (token, expert) pairs
received (in order of arrival), R rows for this rank's slots (the pairs, sorted by slot; R = P), L local slots, B bytes
of a wire row.

A token travels once to every rank that holds any of its experts, with the slots of all its K experts behind it; the
receiver finds its own pairs. Expert outputs travel back one row per pair and are summed at home in top-k order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moestro.router.mesh import Collectives
from moestro.router.transport import Arrival, Dispatched, weighted_sum


@dataclass(frozen=True, slots=True)
class AllToAllHandle:
    """What combine needs to bring the rows of one dispatch home."""

    return_P: Tensor  # into R: which row to send, in order of destination
    send_N: tuple[int, ...]  # rows to return to each rank
    receive_N: tuple[int, ...]  # rows each rank returns to this one
    position_TK: Tensor  # into the rows received: where (token, k) is


@dataclass(frozen=True, slots=True)
class AllToAllTransport:
    """Transport over a process group.

    Two collectives move the rows; a third, of N integers, tells the receivers how many tokens to expect.
    """

    world: Collectives
    capacity: int  # slots of a rank

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, AllToAllHandle]]:
        num_tokens, k = slots_TK.shape
        size = self.world.size
        dest_TK = slots_TK // self.capacity
        wire_TB = torch.cat([x_TD.contiguous().view(torch.uint8), _as_bytes(slots_TK)], dim=1)
        wanted_TN = torch.zeros(num_tokens, size, dtype=torch.bool, device=x_TD.device).scatter_(1, dest_TK, True)
        send_N1 = wanted_TN.sum(0).unsqueeze(1)
        receive_N1 = self.world.all_to_all(send_N1, [1] * size, [1] * size)
        send, receive = torch.cat([send_N1, receive_N1], dim=1).T.tolist()
        # nonzero of the transpose is sorted by rank, then token: the order of sending.
        wire_MB = self.world.all_to_all(wire_TB[wanted_TN.T.nonzero()[:, 1]], send, receive)

        width = x_TD.shape[1] * x_TD.element_size()
        first, num_local = self.world.rank * self.capacity, self.capacity
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
        arrived = Dispatched(x_RD, counts_L), handle
        return lambda: arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: AllToAllHandle) -> Arrival[Tensor]:
        rows = self.world.all_to_all(y_RD[handle.return_P], list(handle.send_N), list(handle.receive_N))
        y_TD = weighted_sum(rows[handle.position_TK], weights_TK)
        return lambda: y_TD


def _as_bytes(slots_TK: Tensor) -> Tensor:
    return slots_TK.to(torch.int32).contiguous().view(torch.uint8)


def _inverse(order: Tensor) -> Tensor:
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    return position
