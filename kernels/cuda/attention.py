"""Paged attention of one layer on CUDA: a ``PagedAttention`` in three launches, or two where keys are not split.

Legend: T tokens, N heads of queries, keys and values together, Q query heads, D head width, C slabs of a cache block, b
tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, Decodes, HeadNorm, PagedAttention, Spans
from moestro.kernels.cuda.attention_plan import CudaPlan, make_plan, plan_decodes
from moestro.kernels.cuda.attention_tile import ROWS, AttentionTile, attention_tile
from moestro.kernels.cuda.paged_attention import attend_
from moestro.kernels.cuda.rotate_write import rotate_write_


@dataclass(frozen=True, slots=True)
class CudaAttention(PagedAttention[CudaPlan]):
    """``sinks_Q``: a logit per query head that joins the sum of its softmax (gpt-oss). ``kv_scale_C``: the cache is
    e4m3, and these fp32 numbers, one per slab, are what its content is multiplied with."""

    shape: AttentionShape
    norm: HeadNorm | None
    tile: AttentionTile
    sinks_Q: Tensor | None = None
    kv_scale_C: Tensor | None = None

    def plan(self, spans: Spans) -> CudaPlan:
        queries = ROWS // (self.shape.num_heads // self.shape.num_kv_heads)
        return make_plan(spans, queries=queries, segment=self.tile.segment, window=self.shape.window)

    def plan_decodes(self, decodes: Decodes) -> CudaPlan:
        """``plan`` by operations on the device alone, to be captured with the step. A sequence with a context of 0 is
        padding, and so is one with a slot below 0 (which writes nothing)."""
        return plan_decodes(decodes, segment=self.tile.segment, window=self.shape.window)

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
                self.tile,
                window=self.shape.window,
                scale=self.shape.scale,
                sinks_Q=self.sinks_Q,
                kv_scale_C=self.kv_scale_C,
            )
        return out_TQD


def make_attention(shape: AttentionShape, norm: HeadNorm | None) -> CudaAttention:
    """Raises ValueError for a shape that these kernels do not compute."""
    group = shape.num_heads // shape.num_kv_heads
    if group > ROWS:
        raise ValueError(f"at most {ROWS} query heads may share a key/value head, not {group}")
    return CudaAttention(shape, norm, attention_tile(shape.head_dim))
