"""The ``cpu`` backend: C++ kernels for bf16 on processors with AVX-512 bf16.

Legend: T tokens, M model width, O output and I input features, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, BackendName, HeadNorm, LayerParts, LayerStack, PagedAttention
from moestro.kernels.cpu.attention import make_cpu_attention
from moestro.kernels.cpu.build import load, unavailable_reason
from moestro.kernels.cpu.experts import make_cpu_experts
from moestro.kernels.cpu.gate import cpu_gate
from moestro.kernels.cpu.linear import make_cpu_linear
from moestro.kernels.cpu.stack import make_cpu_stack
from moestro.kernels.gate import GateSpec
from moestro.kernels.grouped_experts import ExpertShape, Fill, GroupedExperts
from moestro.kernels.linear import Linear
from moestro.kernels.plain import PlainBackend


def why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the ``cpu`` backend cannot compute a model of ``dtype`` on ``device``; None if it can."""
    if device.type != "cpu":
        return f"it computes on CPUs, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return unavailable_reason()


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """A ``Backend``. What is not bf16 on a CPU (a weight in fp32, a model on ``meta`` that is only measured) is left to
    ``plain``."""

    plain: PlainBackend
    name: BackendName = "cpu"

    def empty_weight(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.plain.empty_weight(out_features, in_features, dtype, device)

    def make_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
        if _ours(weight_OI.dtype, weight_OI.device):
            return make_cpu_linear(weight_OI, bias_O)
        return self.plain.make_linear(weight_OI, bias_O)

    def make_experts(self, shape: ExpertShape, fills: Sequence[Fill | None], room: int = 0) -> GroupedExperts:
        if _ours(shape.dtype, shape.device):
            return make_cpu_experts(shape, fills, room)
        return self.plain.make_experts(shape, fills)

    def make_attention(self, shape: AttentionShape, norm: HeadNorm | None) -> PagedAttention[Any]:
        if _ours(shape.dtype, shape.device) and shape.head_dim % 2 == 0:
            return make_cpu_attention(shape, norm)
        return self.plain.make_attention(shape, norm)

    def add_rms_norm(
        self, x_TM: Tensor, delta_TM: Tensor | None, weight_M: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if _ours(x_TM.dtype, x_TM.device):
            stream_TM, h_TM = load().add_rms_norm(x_TM, delta_TM, weight_M, eps)
            return stream_TM, h_TM
        return self.plain.add_rms_norm(x_TM, delta_TM, weight_M, eps)

    def make_stack(self, layers: Sequence[LayerParts]) -> LayerStack | None:
        return make_cpu_stack(layers)

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
        if logits_TE.device.type != "cpu":
            return self.plain.route(logits_TE, bias_E, spec)
        ids_TK, weights_TK = load().route(logits_TE, bias_E, cpu_gate(spec))
        return ids_TK, weights_TK


def make_cpu_backend() -> CpuBackend:
    """Builds and loads the kernels.

    Raises ``BuildError``.
    """
    load()
    return CpuBackend(PlainBackend())


def _ours(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"
