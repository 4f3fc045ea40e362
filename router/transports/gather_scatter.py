"""Gather and scatter, for small batches: every token goes everywhere, so that nobody need ask how many will come.

Legend: T tokens on this rank, M tokens of the whole group, D model width, K experts per token, N ranks, R rows for this
rank's slots, P (token, expert) pairs of the whole group.

The ranks agree on ``num_tokens_N`` before a step, which settles the sizes of the gather. With every token come its
slots, so each rank knows what it will return to whom, as its peers know what they will get.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moestro.router.collectives import Collectives
from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.all_to_all import RowsHandle, return_rows
from moestro.router.transports.rows import check_own_tokens, count, home_positions, local_slots, pack, sort_rows, unpack


@dataclass(frozen=True, slots=True)
class GatherScatterTransport(Transport[RowsHandle]):
    """Two collectives a layer, of exact sizes. The host waits once, for how many rows go to whom."""

    world: Collectives
    capacity: int  # slots of a rank

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, RowsHandle]]:
        rank, size = self.world.rank, self.world.size
        check_own_tokens(num_tokens_N, rank, size, x_TD, slots_TK)
        k = slots_TK.shape[1]
        wires = self.world.start_gather_rows(pack(x_TD, slots_TK), num_tokens_N)
        dest_TK = slots_TK // self.capacity
        receive_N, position_TK = count(dest_TK.reshape(-1), size), home_positions(dest_TK)

        def arrived() -> tuple[Dispatched, RowsHandle]:
            x_MD, slots_MK = unpack(wires(), x_TD.shape[1])
            local_P = local_slots(slots_MK, rank, self.capacity)
            # Up to each rank's last pair: how many are for this rank.
            before_P1 = torch.constant_pad_nd((local_P < self.capacity).cumsum(0), (1, 0))
            until_N = torch.stack([before_P1[end * k] for end in accumulate(num_tokens_N)])
            send_N, received_N = torch.stack((until_N.diff(prepend=before_P1[:1]), receive_N)).tolist()
            pair_R, counts_L = sort_rows(local_P, self.capacity, sum(send_N))
            handle = RowsHandle(torch.argsort(pair_R), tuple(send_N), tuple(received_N), position_TK)
            return Dispatched(x_MD.index_select(0, pair_R // k), counts_L), handle

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: RowsHandle) -> Arrival[Tensor]:
        return return_rows(self.world, y_RD, weights_TK, handle)
