"""The tensors that all graphs read: written before each replay, in one place for graphs of every size.

Legend: S rows of a graph (sequences with one token each), n those of them that are live, B block-table columns, G cache
groups.

The numbers of a step are gathered in pinned memory and cross to the device in two copies. A graph of S rows reads the
first numbers of both, so that small graphs copy little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.workers.batch import Batch, CacheTables


@dataclass(frozen=True, slots=True)
class Rows:
    """One graph's view."""

    token_ids_S: Tensor  # int64
    positions_S: Tensor  # int64
    live_S: Tensor  # int64; 1 for a sequence's row, 0 for padding
    key_S: Tensor  # int64; of the noise of a drawn token, see ``sampling/noise.py``
    context_len_S: Tensor  # int32
    temperature_S: Tensor  # fp32; 0: greedy
    tables_G: tuple[CacheTables, ...]
    wide: Tensor  # all of the int64 numbers, one after the other
    narrow: Tensor  # all of the int32 numbers


@dataclass(frozen=True, slots=True)
class Noise:
    """What rows that are drawn need beside their logits, on the host."""

    temperature_S: Tensor  # fp32; 0: greedy
    key_S: Tensor  # int64


class DecodeBuffers:
    """On the device and in pinned memory. Padding rows are token 0 at position 0 of a sequence of one token, in the
    block ``spare_G`` of each cache group, which belongs to nobody else: what they compute touches no live block."""

    def __init__(
        self, most_rows: int, num_columns: int, spare_G: tuple[int, ...], block_size: int, device: torch.device
    ):
        self.device, self.block_size, self.num_columns = device, block_size, num_columns
        self._spare_G = spare_G
        groups = len(spare_G)
        on_cuda = device.type == "cuda"
        wide, narrow = (4 + groups) * most_rows, (2 + groups * num_columns) * most_rows
        self._host = torch.zeros(wide, dtype=torch.int64), torch.zeros(narrow, dtype=torch.int32)
        if on_cuda:
            self._host = self._host[0].pin_memory(), self._host[1].pin_memory()
        self._device = (
            torch.zeros(wide, dtype=torch.int64, device=device),
            torch.zeros(narrow, dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return sum(tensor.nbytes for tensor in self._device)

    def rows(self, num_rows: int) -> Rows:
        """The tensors that a graph of ``num_rows`` reads."""
        return self._view(*self._device, num_rows)

    def fill_(self, num_rows: int, batch: Batch, noise: Noise | None = None) -> None:
        """Writes a step of decodes, made on the host (``batch`` is on the CPU), and pads it to ``num_rows``. Without
        ``noise`` all rows are greedy. Does not wait for the device; not to be called again before the step is done."""
        n = batch.num_tokens
        host = self._view(*self._host, num_rows)
        host.token_ids_S[:n], host.token_ids_S[n:] = batch.token_ids_T, 0
        host.positions_S[:n], host.positions_S[n:] = batch.positions_T, 0
        host.live_S[:n], host.live_S[n:] = 1, 0
        host.temperature_S.zero_()
        if noise is not None:
            host.temperature_S[:n], host.key_S[:n] = noise.temperature_S, noise.key_S
        torch.add(host.positions_S, 1, out=host.context_len_S)
        for group, (to, spare) in enumerate(zip(host.tables_G, self._spare_G, strict=True)):
            if n:
                tables = batch.tables_G[group]
                to.slot_T[:n] = tables.slot_T
                to.block_table_SB[:n, : tables.block_table_SB.shape[1]] = tables.block_table_SB
            to.slot_T[n:] = spare * self.block_size
            to.block_table_SB[n:, 0] = spare
        device = self.rows(num_rows)
        device.wide.copy_(host.wide, non_blocking=True)
        device.narrow.copy_(host.narrow, non_blocking=True)

    def _view(self, wide: Tensor, narrow: Tensor, num_rows: int) -> Rows:
        groups, columns = len(self._spare_G), self.num_columns
        wide = wide[: (4 + groups) * num_rows]
        narrow = narrow[: (2 + groups * columns) * num_rows]
        token_ids_S, positions_S, live_S, key_S, *slot_GS = wide.view(-1, num_rows).unbind()
        context_len_S, temperature_S = narrow[: 2 * num_rows].view(2, num_rows).unbind()
        tables_GSB = narrow[2 * num_rows :].view(groups, num_rows, columns)
        return Rows(
            token_ids_S,
            positions_S,
            live_S,
            key_S,
            context_len_S,
            temperature_S.view(torch.float32),
            tuple(map(CacheTables, tables_GSB.unbind(), slot_GS)),
            wide,
            narrow,
        )
