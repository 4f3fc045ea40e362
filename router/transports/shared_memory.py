"""Shared memory, for ranks of one host: what another rank needs is read where it was written.

Legend: T tokens on this rank, D model width, K experts per token, N ranks, R rows for this rank's slots, L slots of
this rank.

Every rank puts its tokens with their slots on the board; when all have, each takes the rows of its own slots. Results
are put where their home rank reads them in top-k order. Two operations on the board and two copies of a row each way,
no message, no size to agree on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moestro.router.board import Board
from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.rows import check_own_tokens


@dataclass(frozen=True, slots=True)
class SharedMemoryTransport(Transport[Tensor]):
    """The handle is home_R: whose each row is. Raises ValueError for tokens that do not fit the board, on every rank
    alike and before anything is sent."""

    board: Board
    capacity: int  # slots of a rank

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, Tensor]]:
        check_own_tokens(num_tokens_N, self.board.rank, self.board.size, x_TD, slots_TK)
        operation = self.board.post_tokens(x_TD, slots_TK, max(num_tokens_N))

        def arrived() -> tuple[Dispatched, Tensor]:
            x_RD, counts_L, home_R = self.board.take_rows(
                operation, num_tokens_N, slots_TK.shape[1], self.capacity, x_TD
            )
            return Dispatched(x_RD, counts_L), home_R

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: Tensor) -> Arrival[Tensor]:
        operation = self.board.post_rows(y_RD, handle)
        return lambda: self.board.sum_rows(operation, weights_TK, y_RD)
