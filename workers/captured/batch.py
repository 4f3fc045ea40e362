"""The batch that a graph is captured over: as the model sees any batch, but every number is the device's.

Legend: S rows of a graph, sequences with one token each; T is S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moestro.kernels.backend import Decodes, PagedAttention
from moestro.workers.batch import Batch
from moestro.workers.captured.buffers import Rows
from moestro.workers.health import StepHealth


@dataclass(frozen=True, slots=True)
class DecodeBatch(Batch):
    """``query_start_S1`` is that of one token each; ``context_len_S`` holds nothing: the lengths are in ``rows``."""

    rows: Rows | None = None

    def plan(self, kernel: PagedAttention[Any], group: int, block_size: int) -> Any:
        assert self.rows is not None
        tables = self.tables_G[group]
        return kernel.plan_decodes(Decodes(self.rows.context_len_S, tables.block_table_SB, tables.slot_T, block_size))


def decode_batch(rows: Rows, num_ranks: int, health: StepHealth) -> DecodeBatch:
    """All ranks take the same graph, so each is told the same number of tokens."""
    num_rows = rows.token_ids_S.shape[0]
    return DecodeBatch(
        token_ids_T=rows.token_ids_S,
        positions_T=rows.positions_S,
        query_start_S1=tuple(range(num_rows + 1)),
        context_len_S=(),
        num_decodes=num_rows,
        tables_G=rows.tables_G,
        logit_rows_R=torch.arange(num_rows, device=rows.token_ids_S.device),
        num_tokens_N=(num_rows,) * num_ranks,
        health=health,
        rows=rows,
    )
