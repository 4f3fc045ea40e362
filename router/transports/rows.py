"""Tokens on the wire, and the rows they become where their slots are.

Legend: T tokens of this rank, M tokens received, D model width, W width of a token on the wire, K experts per token,
N ranks, P (token, expert) pairs in order of token, R rows of this rank, L slots of this rank.

Nothing here waits for an accelerator: every size is given by the caller or by a shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.kernels.weighted_sum import weighted_sum


def check_own_tokens(num_tokens_N: tuple[int, ...], rank: int, size: int, x_TD: Tensor, slots_TK: Tensor) -> None:
    """Raises ValueError where this rank is about to send other than its peers were told."""
    if len(num_tokens_N) != size:
        raise ValueError(f"num_tokens_N must have an entry for each of {size} ranks, got {len(num_tokens_N)}")
    if not num_tokens_N[rank] == x_TD.shape[0] == slots_TK.shape[0]:
        raise ValueError(
            f"num_tokens_N[{rank}] is {num_tokens_N[rank]}, but rank {rank} dispatches {x_TD.shape[0]} tokens and the "
            f"slots of {slots_TK.shape[0]}"
        )


def pack(x_TD: Tensor, slots_TK: Tensor) -> Tensor:
    """wire_TW: each token with its slots behind it, 4 bytes each, in the dtype of the token."""
    return torch.cat((x_TD, slots_TK.to(torch.int32).view(x_TD.dtype)), dim=1)


def unpack(wire_MW: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x_MD (a view) and slots_MK."""
    return wire_MW[:, :width], wire_MW[:, width:].contiguous().view(torch.int32).long()


def count(keys_X: Tensor, num_keys: int) -> Tensor:
    """How often each of 0 … num_keys - 1 occurs. Not bincount, which on an accelerator waits to learn how long its
    result is."""
    counts = torch.zeros(num_keys, dtype=torch.int64, device=keys_X.device)
    return counts.scatter_add_(0, keys_X, torch.ones_like(keys_X))


def inverse(order_X: Tensor) -> Tensor:
    """Where in ``order_X`` each of 0 … X - 1 is."""
    return torch.empty_like(order_X).scatter_(0, order_X, torch.arange(order_X.numel(), device=order_X.device))


def local_slots(slots_MK: Tensor, rank: int, capacity: int) -> Tensor:
    """local_P: of each pair of M tokens its slot on ``rank``, or ``capacity`` for a pair of another rank."""
    local_P = slots_MK.reshape(-1) - rank * capacity
    return torch.where((local_P >= 0) & (local_P < capacity), local_P, capacity)


def sort_rows(local_P: Tensor, capacity: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """pair_R, the pairs of this rank sorted by slot and then by token, and counts_L. Where ``num_rows`` is more than
    there are, pairs of other ranks follow as padding."""
    return torch.argsort(local_P, stable=True)[:num_rows], count(local_P, capacity + 1)[:capacity]


def home_positions(dest_TK: Tensor) -> Tensor:
    """position_TK: where the result of each pair arrives, when the ranks of ``dest_TK`` return theirs in order of rank
    and then of pair."""
    return inverse(torch.argsort(dest_TK.reshape(-1), stable=True)).view(dest_TK.shape)


def sum_at_home(rows_XD: Tensor, position_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """y_TD: the weighted sum of the rows at ``position_TK``."""
    rows_PD = rows_XD.index_select(0, position_TK.reshape(-1))
    return weighted_sum(rows_PD.view(*position_TK.shape, rows_XD.shape[1]), weights_TK)
