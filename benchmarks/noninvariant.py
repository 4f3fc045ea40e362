"""The same model with the fastest kernels regardless of invariance, as the baseline of ``benchmarks.invariance``.

Legend: T tokens, I input features, R rows sorted by expert, D model width, L experts, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from benchmarks.noninvariant_attention import SdpaPlan, plan_sdpa, sdpa_attention
from torch import Tensor
from torch.nn.functional import linear, silu

from moestro.kernels.backend import Spans
from moestro.kernels.grouped_experts import Expert, ExpertShape, mix_sorted
from moestro.kernels.linear import PackedLinear, PlainLinear
from moestro.kernels.paged_attention import write_kv_
from moestro.kernels.rms_norm import rms_norm
from moestro.kernels.rotary import rotate
from moestro.workers.kv_cache import LayerCache
from moestro.workers.model.attention import Attention
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.mlp import DenseMlp
from moestro.workers.model.moe import ExpertBank, LocalMixture


@dataclass(frozen=True, slots=True)
class AnyRows:
    """A linear called with as many rows as there are."""

    of: PackedLinear | PlainLinear

    @property
    def out_features(self) -> int:
        return self.of.out_features

    def apply(self, x_TI: Tensor) -> Tensor:
        if isinstance(self.of, PlainLinear):
            return linear(x_TI, self.of.weight_OI, self.of.bias_O)
        if x_TI.shape[0] == 0:
            return x_TI.new_empty(0, self.out_features)
        return torch.ops.mkldnn._linear_pointwise.default(x_TI, self.of.packed, self.of.bias_O, "none", [], "")


@dataclass(frozen=True, slots=True)
class AnyRowsExperts:
    """One product per expert that has rows."""

    shape: ExpertShape
    expert_L: tuple[Expert, ...]

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        if x_RD.shape[0] == 0:
            return x_RD
        counts = counts_L.tolist()
        used = [e for e, count in enumerate(counts) if count]
        pieces = torch.split_with_sizes(x_RD, [counts[e] for e in used])
        hidden_R2I = torch.cat([self.expert_L[e].gate_up.apply(x) for e, x in zip(used, pieces, strict=True)])
        pieces = torch.split_with_sizes(fused_swiglu(hidden_R2I), [counts[e] for e in used])
        return torch.cat([self.expert_L[e].down.apply(x) for e, x in zip(used, pieces, strict=True)])

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        experts: Any = self
        return mix_sorted(experts, len(self.expert_L), x_TD, slots_TK, weights_TK)


def fused_swiglu(gate_up_R2I: Tensor) -> Tensor:
    gate_RI, up_RI = gate_up_R2I.chunk(2, -1)
    return silu(gate_RI) * up_RI


@dataclass(frozen=True, slots=True)
class SdpaAttention:
    """An attention block with ``scaled_dot_product_attention``, of models that do not clip."""

    of: Attention
    qkv: AnyRows
    out: AnyRows

    def forward(self, x_TM: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, plan: SdpaPlan, kv_NCbD: Tensor) -> Tensor:
        block = self.of
        num_tokens, num_heads = x_TM.shape[0], block.heads.num_heads
        qkv_TND = self.qkv.apply(x_TM).view(num_tokens, -1, block.spec.head_dim)
        qk_TND = qkv_TND[:, : num_heads + block.heads.num_kv_heads]
        norm = block.kernel.norm
        normed_TND = qk_TND if norm is None else rms_norm(qk_TND, None, norm.eps) * norm.weight_ND
        qk_TND.copy_(rotate(normed_TND, cos_T1D, sin_T1D))
        kv_TCD = qkv_TND[:, num_heads:]
        write_kv_(kv_NCbD, kv_TCD, plan)
        out_TQD = sdpa_attention(qkv_TND[:, :num_heads], kv_TCD, kv_NCbD, plan, block.spec.scale)
        return self.out.apply(out_TQD.view(num_tokens, -1))

    @property
    def kernel(self) -> SdpaAttention:
        return self

    def plan(self, spans: Spans) -> SdpaPlan:
        return plan_sdpa(
            spans.query_start_S1,
            spans.context_len_S,
            spans.num_decodes,
            spans.block_table_SB,
            spans.slot_T,
            num_kv_heads=self.of.heads.num_kv_heads,
            block_size=spans.block_size,
            window=self.of.spec.window,
            dtype=torch.bfloat16,
        )

    def cache(self, group: int) -> LayerCache:
        return self.of.cache(group)


def noninvariant(model: Decoder) -> Decoder:
    """``model``, of the plain backend, with other kernels around the same weights: bf16, MoE layers without shared
    experts."""
    layers = tuple(replace(layer, attention=_attention(layer.attention), mlp=_mlp(layer.mlp)) for layer in model.layers)
    return replace(model.with_layers(layers), head=replace(model.head, linear=AnyRows(model.head.linear)))


def _attention(block: Attention) -> Any:
    return SdpaAttention(block, AnyRows(block.qkv), AnyRows(block.out))


def _mlp(mlp: Any) -> Any:
    if isinstance(mlp, DenseMlp):
        return replace(mlp, gate_up=AnyRows(mlp.gate_up), down=AnyRows(mlp.down))
    bank = mlp.bank
    experts: Any = AnyRowsExperts(
        bank.experts.shape,
        tuple(Expert(AnyRows(each.gate_up), AnyRows(each.down)) for each in bank.experts.expert_L),
    )
    gate = replace(mlp.gate, linear=AnyRows(mlp.gate.linear))
    return replace(mlp, gate=gate, mixture=LocalMixture(ExpertBank(bank.prefix, experts, bank.held, bank.layout)))
