"""DeepEP's low-latency kernels behind the transport's interface. UNTESTED on hardware: written against DeepEP's source
(its ``Buffer`` of the legacy API), run here only against a stand-in that follows what that documents.

Legend: T tokens on this rank, D model width, K experts per token, P (token, expert) pairs of this rank, N ranks, L
slots of this rank, X places for rows of one slot (N times the most pairs of a rank), R rows for this rank's slots,
padding included.

What is relied on: ``low_latency_dispatch`` sends one message per token and expert; slot i gets the first ``count[i]``
of its X places, in any order; ``low_latency_combine`` returns every row to the token it was of and gives
``Σ_k weight_k · row_k``, summed in fp32 in the order of k. No fp8, no LogFMT: rows travel as they are.

DeepEP's own weighted sum is not used. It fuses multiplication and addition, so its last bits would differ from those of
every other transport and the number of ranks would show in the answers. Each (token, expert) pair is sent as a token
with one expert and the weight 1, so that combine hands back the rows themselves (1 · row + 0 is the row, but for the
sign of a zero), and they are summed as everywhere else. The wire carries the same bytes, since a token travels once per
expert in any case; the receive buffers are K times as large.

Only one dispatch or combine may be under way: sending the next clears the counters of the one before it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.weighted_sum import weighted_sum
from moestro.router.mesh import Collectives
from moestro.router.transport import Arrival, Dispatched, Transport
from moestro.router.transports.rows import check_own_tokens


def is_installed() -> bool:
    return find_spec("deep_ep") is not None


@dataclass(frozen=True, slots=True)
class ControlComm:
    """As much of an MPI communicator as DeepEP asks for while it builds a buffer, over a group of host tensors."""

    control: Collectives

    def Get_rank(self) -> int:
        return self.control.rank

    def Get_size(self) -> int:
        return self.control.size

    def allgather(self, value: Any) -> list[Any]:
        """Pickled: the peers are ranks of the same group."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).unsqueeze(1)
        sizes = self.control.all_gather(torch.tensor(mine.shape[:1])).flatten().tolist()
        pieces = torch.split_with_sizes(self.control.start_gather_rows(mine, sizes)().flatten(), sizes)
        return [pickle.loads(piece.numpy().tobytes()) for piece in pieces]


@dataclass(frozen=True, slots=True)
class DeepEPHandle:
    """What combine needs to bring the rows of one dispatch home."""

    place_R: Tensor  # into L · X: where each row was found; L · X for padding
    slots_P1: Tensor
    num_places: int  # of one slot: X
    inner: Any  # DeepEP's own


class DeepEPTransport(Transport[DeepEPHandle]):
    """The buffer is made at the first dispatch, which tells the model's width and K; that is collective."""

    def __init__(self, control: Collectives, capacity: int, max_num_tokens: int) -> None:
        """``max_num_tokens`` bounds what a rank dispatches in one call."""
        self._control, self._capacity, self._max_num_tokens = control, capacity, max_num_tokens
        self._buffer: Any = None

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, DeepEPHandle]]:
        check_own_tokens(num_tokens_N, self._control.rank, self._control.size, x_TD, slots_TK)
        if max(num_tokens_N) > self._max_num_tokens:
            raise ValueError(f"a rank may dispatch {self._max_num_tokens} tokens, num_tokens_N is {num_tokens_N}")
        k, width = slots_TK.shape[1], x_TD.shape[1]
        # The receive buffers must be multiples of four rows.
        max_pairs, num_slots = -(-self._max_num_tokens * k // 4) * 4, self._control.size * self._capacity
        buffer, index_dtype = self._open(width, max_pairs, num_slots)
        slots_P1 = slots_TK.reshape(-1, 1).to(index_dtype)
        recv_LXD, count_L, inner, _, receive = buffer.low_latency_dispatch(
            x_TD.repeat_interleave(k, dim=0), slots_P1, max_pairs, num_slots, use_fp8=False, return_recv_hook=True
        )
        num_rows = sum(num_tokens_N) * min(k, self._capacity)

        def arrived() -> tuple[Dispatched, DeepEPHandle]:
            receive()
            counts_L = count_L.to(torch.int64)
            place_R = _places(counts_L, recv_LXD.shape[1], num_rows)
            found_R = place_R.remainder(recv_LXD.shape[0] * recv_LXD.shape[1])
            x_RD = recv_LXD.view(-1, width).index_select(0, found_R)
            return Dispatched(x_RD, counts_L), DeepEPHandle(place_R, slots_P1, recv_LXD.shape[1], inner)

        return arrived

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: DeepEPHandle) -> Arrival[Tensor]:
        num_places, width = self._capacity * handle.num_places, y_RD.shape[1]
        # One place more, for padding. Places that got no row are not sent.
        y_XD = y_RD.new_empty(num_places + 1, width).index_copy_(0, handle.place_R, y_RD)
        ones_P1 = torch.ones(handle.slots_P1.shape, dtype=torch.float32, device=y_RD.device)
        rows_PD, _, receive = self._buffer.low_latency_combine(
            y_XD[:num_places].view(self._capacity, handle.num_places, width),
            handle.slots_P1,
            ones_P1,
            handle.inner,
            return_recv_hook=True,
        )

        def arrived() -> Tensor:
            receive()
            return weighted_sum(rows_PD.view(*weights_TK.shape, width), weights_TK)

        return arrived

    def _open(self, width: int, max_pairs: int, num_slots: int) -> tuple[Any, torch.dtype]:
        library = import_module("deep_ep")
        if self._buffer is None:
            num_bytes = library.Buffer.get_low_latency_rdma_size_hint(max_pairs, width, self._control.size, num_slots)
            self._buffer = library.Buffer(
                None,
                num_rdma_bytes=num_bytes,
                low_latency_mode=True,
                num_qps_per_rank=self._capacity,
                comm=ControlComm(self._control),
            )
        return self._buffer, library.topk_idx_t


def _places(counts_L: Tensor, per_slot: int, num_rows: int) -> Tensor:
    """place_R, into L · per_slot: where row r of the first ``counts_L`` places of each slot is; L · per_slot beyond
    their sum."""
    ends_L = counts_L.cumsum(0)
    row_R = torch.arange(num_rows, device=counts_L.device)
    slot_R = torch.searchsorted(ends_L, row_R, right=True)
    found_R = slot_R.clamp(max=counts_L.shape[0] - 1)
    within_R = row_R - (ends_L - counts_L)[found_R]
    return torch.where(slot_R < counts_L.shape[0], found_R * per_slot + within_R, counts_L.shape[0] * per_slot)
