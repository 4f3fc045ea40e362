"""The plain backend: torch operations, on any device and in any dtype. What the others are judged by.

Legend: T tokens, M model width, N heads of queries, keys and values together, Q query heads, D head width, N blocks of
the cache, C slabs of a block, b tokens of a block, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.attention_tiles import AttentionTiles, attention_tiles
from moestro.kernels.backend import AttentionShape, BackendName, Decodes, HeadNorm, LayerParts, PagedAttention, Spans
from moestro.kernels.decode_plan import plan_decodes
from moestro.kernels.gate import GateSpec, route
from moestro.kernels.grouped_experts import ExpertShape, Fill, GroupedExperts, make_experts
from moestro.kernels.linear import Linear, empty_weight, make_linear
from moestro.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention, write_kv_
from moestro.kernels.rms_norm import rms_norm
from moestro.kernels.rotary import rotate


@dataclass(frozen=True, slots=True)
class PlainAttention(PagedAttention[AttentionPlan]):
    """Attention over gathered tiles; see ``paged_attention.py``."""

    shape: AttentionShape
    norm: HeadNorm | None
    tiles: AttentionTiles

    def plan(self, spans: Spans) -> AttentionPlan:
        return plan_attention(
            spans.query_start_S1,
            spans.context_len_S,
            spans.num_decodes,
            spans.block_table_SB,
            spans.slot_T,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=spans.block_size,
            window=self.shape.window,
            tiles=self.tiles,
        )

    def plan_decodes(self, decodes: Decodes) -> AttentionPlan:
        return plan_decodes(decodes, num_kv_heads=self.shape.num_kv_heads, window=self.shape.window, tiles=self.tiles)

    def apply(self, qkv_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, kv_NCbD: Tensor, plan: AttentionPlan) -> Tensor:
        num_heads, rotary_dim = self.shape.num_heads, self.shape.rotary_dim
        qk_TND = qkv_TND[:, : num_heads + self.shape.num_kv_heads]
        normed_TND = qk_TND
        if self.norm is not None:
            normed_TND = rms_norm(qk_TND, None, self.norm.eps) * self.norm.weight_ND
        if rotary_dim < self.shape.head_dim:
            qk_TND[..., rotary_dim:].copy_(normed_TND[..., rotary_dim:])
        # Rotated in fp32 and rounded once, into the buffer from which queries are read and the cache is written.
        qk_TND[..., :rotary_dim].copy_(rotate(normed_TND[..., :rotary_dim], cos_T1D, sin_T1D))
        write_kv_(kv_NCbD, qkv_TND[:, num_heads:], plan)
        return paged_attention(qkv_TND[:, :num_heads], kv_NCbD, plan, self.shape.scale)


@dataclass(frozen=True, slots=True)
class PlainBackend:
    """A ``Backend``."""

    name: BackendName = "plain"

    def empty_weight(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty_weight(out_features, in_features, dtype, device)

    def make_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        return make_linear(weight_OI, bias_O)

    def make_experts(self, shape: ExpertShape, fills: Sequence[Fill | None], room: int = 0) -> GroupedExperts:
        return make_experts(shape, fills)

    def make_attention(self, shape: AttentionShape, norm: HeadNorm | None) -> PlainAttention:
        tiles = attention_tiles(shape.head_dim, shape.num_heads // shape.num_kv_heads, shape.device)
        return PlainAttention(shape, norm, tiles)

    def add_rms_norm(
        self, x_TM: Tensor, delta_TM: Tensor | None, weight_M: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        sum_TM = x_TM if delta_TM is None else x_TM + delta_TM
        return sum_TM, rms_norm(sum_TM, weight_M, eps)

    def make_stack(self, layers: Sequence[LayerParts]) -> None:
        return None

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
        return route(logits_TE, bias_E, spec)
