"""Attention in C++: one call per layer, over the cache where it lies.

Legend: T tokens, N heads of queries, keys and values together, Q query heads, D head width, C slabs of a cache block, b
tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moestro.kernels.backend import AttentionShape, Decodes, HeadNorm, PagedAttention, Spans
from moestro.kernels.cpu.build import load


@dataclass(frozen=True, slots=True)
class CpuAttention(PagedAttention[Any]):
    """Queries, keys and values in bf16, everything between in fp32; see ``attention_piece.h``."""

    shape: Any  # as the module knows it
    weight_ND: Tensor | None  # fp32
    eps: float

    def plan(self, spans: Spans) -> Any:
        return load().plan_attention(
            self.shape,
            spans.query_start_S1,
            spans.context_len_S,
            spans.block_table_SB,
            spans.slot_T,
            spans.block_size,
        )

    def plan_decodes(self, decodes: Decodes) -> Any:
        """Nothing captures a step on a CPU, where the host may read what it likes."""
        lengths = decodes.context_len_S.tolist()
        starts, table = range(len(lengths) + 1), decodes.block_table_SB
        return self.plan(Spans(starts, lengths, len(lengths), table, decodes.slot_S, decodes.block_size))

    def apply(self, qkv_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, kv_NCbD: Tensor, plan: Any) -> Tensor:
        """Leaves the queries as they were multiplied in ``qkv_TND``."""
        out_TQD: Tensor = load().paged_attention(
            self.shape, self.weight_ND, self.eps, qkv_TND, cos_T1D, sin_T1D, kv_NCbD, plan
        )
        return out_TQD


def make_cpu_attention(shape: AttentionShape, norm: HeadNorm | None) -> CpuAttention:
    """Raises ``ValueError`` where the head width is odd."""
    ours = load().AttentionShape(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim, shape.scale, shape.window
    )
    return CpuAttention(ours, None, 0.0) if norm is None else CpuAttention(ours, norm.weight_ND, norm.eps)
