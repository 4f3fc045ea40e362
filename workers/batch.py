"""What one forward pass works on: the spans of a step as ragged tensors.

Legend: T tokens of the step over all sequences, S sequences, B block-table columns, R rows whose logits are wanted,
G cache groups. A span is the run of tokens of one sequence that this step computes; there is no other difference
between prefill, decode and verification.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moestro.kernels.backend import PagedAttention, Spans
from moestro.workers.health import StepHealth
from moestro.workers.hidden_trace import HiddenTrace


@dataclass(frozen=True, slots=True)
class CacheTables:
    """Where one cache group's keys and values live. A group is the layers that share a block table: all full-attention
    layers are one group, all layers of the same sliding window another."""

    block_table_SB: Tensor  # int32; block ids in the order of positions, padded with 0; behind a window: 0
    slot_T: Tensor  # int64; block id * block_size + offset where each new token's keys and values are written


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens, sequence after sequence. Sequences with one token (decodes) come first."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64; index of each token in its sequence
    query_start_S1: tuple[int, ...]  # S + 1; span s is query_start_S1[s] : query_start_S1[s + 1]
    context_len_S: tuple[int, ...]  # tokens in the cache after this step, this span included
    num_decodes: int  # the first num_decodes spans have exactly one token
    tables_G: tuple[CacheTables, ...]
    logit_rows_R: Tensor  # int64 indices into T
    num_tokens_N: tuple[int, ...]  # tokens of this step on every rank of the group
    health: StepHealth = field(default_factory=StepHealth)  # watches for what is not a number
    trace: HiddenTrace | None = None  # takes the hidden states in, when somebody asked

    @property
    def num_tokens(self) -> int:
        return self.query_start_S1[-1]

    def plan(self, kernel: PagedAttention[Any], group: int, block_size: int) -> Any:
        """The plan of a cache group, by the attention of its layers."""
        tables = self.tables_G[group]
        return kernel.plan(
            Spans(
                self.query_start_S1,
                self.context_len_S,
                self.num_decodes,
                tables.block_table_SB,
                tables.slot_T,
                block_size,
            )
        )
