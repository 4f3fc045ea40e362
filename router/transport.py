"""Moving expert rows between ranks: dispatch gives a receipt, combine consumes it.

Legend: T tokens on this rank, D model width, K experts per token, R rows this rank's experts receive, L experts held by
this rank. One row is one (token, expert) pair.

The interface is DeepEP's idea (a dispatch returns the handle its combine needs) with plain values: no ambient context.
Combine returns the rows *unreduced* to the rank that dispatched them and sums them there in top-k order in fp32, so
that placement and the number of ranks cannot change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's experts, sorted by local expert: ``counts_L[e]`` rows for expert e, in order."""

    x_RD: Tensor
    counts_L: Tensor  # int64, on the device of x_RD; sums to R


Handle = TypeVar("Handle")


class Transport(Protocol[Handle]):
    """One expert-parallel backend."""

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The logical experts this rank holds, in the order of ``counts_L``."""

    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor) -> tuple[Dispatched, Handle]:
        """Sends every token to its K experts (logical ids, distinct within a token). Collective: every rank of the
        group calls it once a layer, with zero tokens too."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: Handle) -> Tensor:
        """Brings the rows of ``dispatch`` back home: y_TD, the weighted sum in top-k order, summed in fp32, in the
        dtype of ``y_RD``. Collective."""


_WEIGHED_AT_ONCE = {"cpu": 1 << 16}
"""Elements up to which all rows are weighed in one operation: on a CPU while they fit its cache; an accelerator is
better off with few and large operations. The bits are the same."""


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over K in order, in fp32. A loop and not a reduction: the order is part of the contract."""
    terms: Iterator[Tensor]
    if y_TKD.numel() <= _WEIGHED_AT_ONCE.get(y_TKD.device.type, 1 << 28):
        terms = iter((y_TKD.float() * weights_TK.float().unsqueeze(-1)).unbind(1))
    else:
        terms = (y_TKD[:, k].float() * weights_TK[:, k, None].float() for k in range(y_TKD.shape[1]))
    out_TD = next(terms)
    for term_TD in terms:
        out_TD = out_TD + term_TD
    return out_TD.to(y_TKD.dtype)


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """Where each (token, k) row went: position in the sorted rows."""

    position_TK: Tensor


@dataclass(frozen=True, slots=True)
class LocalTransport:
    """Every expert on this rank: a sort there, a gather back."""

    num_experts: int

    @property
    def local_experts(self) -> tuple[int, ...]:
        return tuple(range(self.num_experts))

    def dispatch(self, x_TD: Tensor, topk_ids_TK: Tensor) -> tuple[Dispatched, LocalHandle]:
        num_tokens, k = topk_ids_TK.shape
        ids_R = topk_ids_TK.reshape(-1)
        order_R = torch.argsort(ids_R, stable=True)
        # Not bincount, which on an accelerator waits to learn how long its result is.
        counts_L = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_R.device)
        counts_L.scatter_add_(0, ids_R, torch.ones_like(ids_R))
        position_R = torch.empty_like(order_R)
        position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        x_RD = x_TD[order_R // k]
        return Dispatched(x_RD, counts_L), LocalHandle(position_R.view(num_tokens, k))

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: LocalHandle) -> Tensor:
        return weighted_sum(y_RD[handle.position_TK], weights_TK)
