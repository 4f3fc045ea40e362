"""Paged attention of one layer on CUDA: a ``PagedAttention`` in three launches, or two where keys are not split.

Legend: T tokens, N heads of queries, keys and values together, Q query heads, D head width, C slabs of a cache block, b
tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, HeadNorm, PagedAttention, Spans
from moestro.kernels.cuda.attention_plan import CudaPlan, count_segments, decode_buffers, make_plan
from moestro.kernels.cuda.paged_attention import ROWS, attend_, attention_tile
from moestro.kernels.cuda.rotate_write import rotate_write_


@dataclass(frozen=True, slots=True)
class CudaAttention(PagedAttention[CudaPlan]):
    """``sinks_Q``: a logit per query head that joins the sum of its softmax (gpt-oss). ``kv_scale_C``: the cache is e4m3,
    and these fp32 numbers, one per slab, are what its content is multiplied with."""

    shape: AttentionShape
    norm: HeadNorm | None
    sinks_Q: Tensor | None = None
    kv_scale_C: Tensor | None = None

    def plan(self, spans: Spans) -> CudaPlan:
        return make_plan(spans, queries=self._queries, segment=self._segment, window=self.shape.window)

    def static_plan(self, num_sequences: int, max_context: int, block_size: int) -> CudaPlan:
        """An empty step of decodes to be captured: every replay computes what was last copied into it (``copy_``). Its
        memory and its launches are of this size whatever is copied."""
        longest = count_segments(max_context - 1, max_context - 1, self._segment, self.shape.window)
        # A window may begin at the end of a segment.
        segments = longest if self.shape.window is None else (self.shape.window - 2) // self._segment + 2
        columns = -(-max_context // block_size)
        return decode_buffers(num_sequences, columns, min(segments, -(-max_context // self._segment)), self.shape.device)

    def apply(self, qkv_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, kv_NCbD: Tensor, plan: CudaPlan) -> Tensor:
        num_heads = self.shape.num_heads
        weight_ND, eps = (None, 0.0) if self.norm is None else (self.norm.weight_ND, self.norm.eps)
        rotate_write_(qkv_TND, cos_T1D, sin_T1D, weight_ND, eps, plan.slot_T, kv_NCbD, num_heads, self.kv_scale_C)
        out_TQD = torch.empty_like(qkv_TND[:, :num_heads], memory_format=torch.contiguous_format)
        for work in plan.works:
            attend_(
                out_TQD,
                qkv_TND,
                kv_NCbD,
                plan.block_table_SB,
                work,
                window=self.shape.window,
                scale=self.shape.scale,
                sinks_Q=self.sinks_Q,
                kv_scale_C=self.kv_scale_C,
            )
        return out_TQD

    @property
    def _queries(self) -> int:
        """Of a query block."""
        return ROWS // (self.shape.num_heads // self.shape.num_kv_heads)

    @property
    def _segment(self) -> int:
        return attention_tile(self.shape.head_dim).segment


def make_attention(shape: AttentionShape, norm: HeadNorm | None) -> CudaAttention:
    """Raises ValueError for a shape that these kernels do not compute."""
    group = shape.num_heads // shape.num_kv_heads
    if group > ROWS:
        raise ValueError(f"at most {ROWS} query heads may share a key/value head, not {group}")
    attention_tile(shape.head_dim)
    return CudaAttention(shape, norm)
