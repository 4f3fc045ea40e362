"""Attention in C++: one call per layer, over the cache where it lies.

Legend: T tokens, N heads of queries, keys and values together, Q query heads, D head width, C slabs of a cache block, b
tokens of a block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moestro.kernels.backend import AttentionShape, HeadNorm, PagedAttention, Spans
from moestro.kernels.cpu.build import load


class CpuAttention(PagedAttention[Any]):
    """Keys and values in bf16, everything between in fp32; see ``attention_piece.h``. Head widths are even."""

    def __init__(self, shape: AttentionShape, norm: HeadNorm | None) -> None:
        self._module = load()
        self._shape = self._module.AttentionShape(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim, shape.scale, shape.window
        )
        self._weight_ND = None if norm is None else norm.weight_ND.contiguous()
        self._eps = 0.0 if norm is None else norm.eps

    def plan(self, spans: Spans) -> Any:
        return self._module.plan_attention(
            self._shape,
            spans.query_start_S1,
            spans.context_len_S,
            spans.block_table_SB,
            spans.slot_T,
            spans.block_size,
        )

    def apply(self, qkv_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, kv_NCbD: Tensor, plan: Any) -> Tensor:
        out_TQD: Tensor = self._module.paged_attention(
            self._shape, self._weight_ND, self._eps, qkv_TND, cos_T1D, sin_T1D, kv_NCbD, plan
        )
        return out_TQD
