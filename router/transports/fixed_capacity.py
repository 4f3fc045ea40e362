"""Fixed capacity: shapes depend on a bucket of the largest rank's tokens and on nothing that is routed.

Legend: T tokens on this rank, B tokens of a bucket, M tokens of the whole group (N · B), D model width, K experts per
token, N ranks, C rows that a rank may return of one token, R rows for this rank's slots (M · C, padding included),
P pairs of the whole group (M · K), X rows returned or received (M · C).

The host waits for nothing: no size is read back. So a CUDA graph may capture it, one for each bucket, where the batch
itself is padded to the bucket. It pays with padding: every rank gets every token and returns C = min(K, slots of a
rank) rows of each, used or not. DeepEP's low-latency kernels make the same trade.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moestro.router.collectives import Collectives
from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.rows import check_own_tokens, local_slots, pack, sort_rows, sum_at_home, unpack


def bucket_of(num_tokens: int) -> int:
    """The power of two at or above ``num_tokens``; 0 for none."""
    return 1 << (num_tokens - 1).bit_length() if num_tokens else 0


@dataclass(frozen=True, slots=True)
class FixedHandle:
    """What combine needs to bring the rows of one dispatch home."""

    return_X: Tensor  # into R: which row lies where; the first where none is wanted
    position_TK: Tensor  # into X as received


@dataclass(frozen=True, slots=True)
class FixedCapacityTransport(Transport[FixedHandle]):
    """Two collectives a layer of fixed, equal sizes.

    A token that names slot -1 is padding of the batch: it is sent to nobody, and what comes home for it is the result
    of another row."""

    world: Collectives
    capacity: int  # slots of a rank

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, FixedHandle]]:
        rank, size, capacity = self.world.rank, self.world.size, self.capacity
        check_own_tokens(num_tokens_N, rank, size, x_TD, slots_TK)
        (num_tokens, k), bucket = slots_TK.shape, bucket_of(max(num_tokens_N))
        per_token = min(k, capacity)
        # No rank has slot -1: padding is nobody's.
        missing = (0, 0, 0, bucket - num_tokens)
        wire_BW = pack(pad(x_TD, missing), pad(slots_TK, missing, value=-1))
        wires = self.world.start_gather_rows(wire_BW, (bucket,) * size)
        dest_TK = slots_TK // capacity
        token_T1 = torch.arange(num_tokens, device=x_TD.device).unsqueeze(1)
        position_TK = ((dest_TK * bucket + token_T1) * per_token + _place(dest_TK)).clamp_(min=0)

        def arrived() -> tuple[Dispatched, FixedHandle]:
            x_MD, slots_MK = unpack(wires(), x_TD.shape[1])
            local_P = local_slots(slots_MK, rank, capacity)
            pair_R, counts_L = sort_rows(local_P, capacity, slots_MK.shape[0] * per_token)
            token_R = pair_R // k
            # Where a row lies among those returned: by token, then by its place among the token's pairs here.
            mine_MK = (local_P < capacity).view(slots_MK.shape)
            place_P = (mine_MK.cumsum(1) - 1).reshape(-1)
            num_rows = pair_R.shape[0]
            into_R = torch.where(local_P[pair_R] < capacity, token_R * per_token + place_P[pair_R], num_rows)
            row_R = torch.arange(num_rows, device=x_TD.device)
            return_X = torch.zeros(num_rows + 1, dtype=torch.int64, device=x_TD.device).scatter_(0, into_R, row_R)
            handle = FixedHandle(return_X[:num_rows], position_TK)
            return Dispatched(x_MD.index_select(0, token_R), counts_L), handle

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: FixedHandle) -> Arrival[Tensor]:
        each = (y_RD.shape[0] // self.world.size,) * self.world.size
        rows = self.world.start_all_to_all(y_RD.index_select(0, handle.return_X), each, each)
        return lambda: sum_at_home(rows(), handle.position_TK, weights_TK)


def _place(dest_TK: Tensor) -> Tensor:
    """Of each pair: how many earlier pairs of its token go to the same rank."""
    same_TKK = dest_TK.unsqueeze(2) == dest_TK.unsqueeze(1)
    return same_TKK.tril(-1).sum(2)
