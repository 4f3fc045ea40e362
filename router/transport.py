"""Moving expert rows between ranks: dispatch gives a receipt, combine consumes it.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, R rows this rank's experts receive, L slots
of this rank. One row is one (token, expert) pair.

The interface is DeepEP's idea (a dispatch returns the handle its combine needs) with plain values: no ambient context.
It knows slots and not experts, so a change of placement is none of its business. Combine returns the rows *unreduced*
to the rank that dispatched them and sums them there in top-k order in fp32, so that placement and the number of ranks
cannot change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from moestro.kernels.grouped_experts import sort_by_slot
from moestro.kernels.weighted_sum import weighted_sum


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


@dataclass(frozen=True, slots=True)
class LocalTransport(Transport[Tensor]):
    """Every slot on this rank: a sort there, a gather back. The handle is position_TK, where each row went."""

    num_slots: int

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, Tensor]]:
        x_RD, counts_L, position_TK = sort_by_slot(x_TD, slots_TK, self.num_slots)
        return lambda: (Dispatched(x_RD, counts_L), position_TK)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: Tensor) -> Arrival[Tensor]:
        y_TD = weighted_sum(y_RD[handle], weights_TK)
        return lambda: y_TD
