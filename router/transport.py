"""Moving expert rows between ranks: dispatch gives a receipt, combine consumes it.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, R rows this rank's experts receive, L slots
of this rank. One row is one (token, expert) pair.

The interface is DeepEP's idea (a dispatch returns the handle its combine needs) with plain values: no ambient context.
It knows slots and not experts, so a change of placement is none of its business. Combine returns the rows *unreduced*
to the rank that dispatched them and sums them there in top-k order in fp32, so that placement and the number of ranks
cannot change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for this rank's slots, sorted by slot: ``counts_L[i]`` rows for slot i, in order. Rows beyond their sum are
    padding of a transport whose sizes are fixed: computed or not, nobody reads them."""

    x_RD: Tensor
    counts_L: Tensor  # int64, on the device of x_RD


Result = TypeVar("Result")
Arrival = Callable[[], Result]
"""Something under way: calling it, once, waits for it and returns it. What is done in between is overlapped."""

Handle = TypeVar("Handle")


class Transport(Protocol[Handle]):
    """One expert-parallel backend.

    Both calls are collective: every rank of the group makes them once a layer, with zero tokens too, in the same order,
    and awaits every arrival. A second dispatch may be under way before the first is combined.
    """

    def num_parts(self, num_tokens_N: tuple[int, ...]) -> int:
        """In how many dispatches a layer's tokens are best sent: of several, one travels while another is computed."""
        return 1

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, Handle]]:
        """Sends every token to its K slots (numbers over the whole group; a token may name each rank several times,
        each slot once). ``num_tokens_N`` is what every rank dispatches in this call, the same on all of them. Raises
        ValueError before anything is sent if this rank's own entry is not what it was given."""

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: Handle) -> Arrival[Tensor]:
        """Brings the rows of a dispatch back home: y_TD, the weighted sum in top-k order, summed in fp32, in the dtype
        of ``y_RD``."""


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
class LocalTransport(Transport[LocalHandle]):
    """Every slot on this rank: a sort there, a gather back."""

    num_slots: int

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, LocalHandle]]:
        num_tokens, k = slots_TK.shape
        slots_R = slots_TK.reshape(-1)
        order_R = torch.argsort(slots_R, stable=True)
        # Not bincount, which on an accelerator waits to learn how long its result is.
        counts_L = torch.zeros(self.num_slots, dtype=torch.int64, device=slots_R.device)
        counts_L.scatter_add_(0, slots_R, torch.ones_like(slots_R))
        position_R = torch.empty_like(order_R)
        position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        x_RD = x_TD[order_R // k]
        arrived = Dispatched(x_RD, counts_L), LocalHandle(position_R.view(num_tokens, k))
        return lambda: arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: LocalHandle) -> Arrival[Tensor]:
        y_TD = weighted_sum(y_RD[handle.position_TK], weights_TK)
        return lambda: y_TD
