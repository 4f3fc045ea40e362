"""The cuda backend: Triton kernels, for bf16 on NVIDIA GPUs from Hopper on.

Legend: T tokens, M model width, O output and I input features, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, BackendName, HeadNorm, LayerParts
from moestro.kernels.cuda import gate
from moestro.kernels.cuda.attention import CudaAttention, make_attention
from moestro.kernels.cuda.experts import make_cuda_experts
from moestro.kernels.cuda.linear import CudaLinear
from moestro.kernels.cuda.norm import add_rms_norm
from moestro.kernels.gate import GateSpec
from moestro.kernels.grouped_experts import ExpertShape, Fill, GroupedExperts
from moestro.kernels.linear import Linear


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """A ``Backend``. Linears may be in fp32 too, as some gates are."""

    name: BackendName = "cuda"

    def empty_weight(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(out_features, in_features, dtype=dtype, device=device)

    def make_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        return CudaLinear(weight_OI.contiguous(), bias_O)

    def make_experts(self, shape: ExpertShape, fills: Sequence[Fill | None], room: int = 0) -> GroupedExperts:
        return make_cuda_experts(shape, fills)

    def make_attention(self, shape: AttentionShape, norm: HeadNorm | None) -> CudaAttention:
        return make_attention(shape, norm)

    def add_rms_norm(
        self, x_TM: Tensor, delta_TM: Tensor | None, weight_M: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x_TM, delta_TM, weight_M, eps)

    def make_stack(self, layers: Sequence[LayerParts]) -> None:
        """A captured step has no calls to save."""

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
        return gate.route(logits_TE, bias_E, spec)
