"""All-to-all with exchanged counts: a token goes only where its experts are.

Legend: T tokens on this rank, D model width, W width of a token on the wire, K experts per token, N ranks, M tokens
received, R rows for this rank's slots, P the same in order of arrival.

A token travels once to every rank that holds any of its experts, with the slots of all its K experts behind it; the
receiver finds its own pairs. Expert outputs travel back one row per pair and are summed at home in top-k order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.router.collectives import Collectives
from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.rows import (
    check_own_tokens,
    count,
    home_positions,
    local_slots,
    pack,
    sort_rows,
    sum_at_home,
    unpack,
)


@dataclass(frozen=True, slots=True)
class RowsHandle:
    """What combine needs to bring the rows of one dispatch home, where all sizes are exact."""

    return_P: Tensor  # into R: which row to send, in order of destination
    send_N: tuple[int, ...]  # rows to return to each rank
    receive_N: tuple[int, ...]  # rows each rank returns to this one
    position_TK: Tensor  # into the rows received: where (token, k) is


@dataclass(frozen=True, slots=True)
class AllToAllTransport(Transport[RowsHandle]):
    """Three collectives a layer: two move rows, one of 2 N integers goes before them to say how many. The host waits
    for those once and for nothing else. ``dispatch`` returns when they are here and the tokens are on their way."""

    world: Collectives
    capacity: int  # slots of a rank

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, RowsHandle]]:
        rank, size = self.world.rank, self.world.size
        check_own_tokens(num_tokens_N, rank, size, x_TD, slots_TK)
        num_tokens = x_TD.shape[0]
        dest_TK = slots_TK // self.capacity
        wanted_TN = torch.zeros(num_tokens, size, dtype=torch.int64, device=x_TD.device).scatter_(1, dest_TK, 1)
        out_N2 = torch.stack((wanted_TN.sum(0), count(dest_TK.reshape(-1), size)), 1)
        counts = self.world.start_all_to_all(out_N2, [1] * size, [1] * size)
        # While they travel: sorted by rank, then by token, which is the order of sending.
        order_X = torch.argsort(wanted_TN.T.reshape(-1), descending=True, stable=True)
        wire_TW, position_TK = pack(x_TD, slots_TK), home_positions(dest_TK)

        sent, receive_N, arriving, send_N = torch.cat((out_N2, counts()), 1).T.tolist()
        token_X = order_X[: sum(sent)].remainder(num_tokens or 1)
        wires = self.world.start_all_to_all(wire_TW.index_select(0, token_X), sent, arriving)

        def arrived() -> tuple[Dispatched, RowsHandle]:
            x_MD, slots_MK = unpack(wires(), x_TD.shape[1])
            pair_R, counts_L = sort_rows(local_slots(slots_MK, rank, self.capacity), self.capacity, sum(send_N))
            x_RD = x_MD.index_select(0, pair_R // slots_TK.shape[1])
            handle = RowsHandle(torch.argsort(pair_R), tuple(send_N), tuple(receive_N), position_TK)
            return Dispatched(x_RD, counts_L), handle

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: RowsHandle) -> Arrival[Tensor]:
        return return_rows(self.world, y_RD, weights_TK, handle)


def return_rows(world: Collectives, y_RD: Tensor, weights_TK: Tensor, handle: RowsHandle) -> Arrival[Tensor]:
    """Every row to the rank whose token it is, and their sum there."""
    rows = world.start_all_to_all(y_RD.index_select(0, handle.return_P), handle.send_N, handle.receive_N)
    return lambda: sum_at_home(rows(), handle.position_TK, weights_TK)
