"""The gate of a mixture layer: its weights and the rule it follows.

Legend: T tokens, M model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.backend import Backend
from moestro.kernels.gate import GateSpec
from moestro.kernels.linear import Linear
from moestro.workers.model.weights import WeightSource, read, read_linear


@dataclass(frozen=True, slots=True)
class Gate:
    """Held whole on every rank."""

    spec: GateSpec
    linear: Linear
    dtype: torch.dtype  # of the product
    bias_E: Tensor | None  # fp32; raises scores for the choice only
    backend: Backend

    def route(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """ids_TK and weights_TK; see ``kernels/gate.py``, also for what NaN makes of them."""
        return self.backend.route(self.linear.apply(x_TM.to(self.dtype)), self.bias_E, self.spec)


def build_gate(spec: GateSpec, hidden_size: int, prefix: str, source: WeightSource) -> Gate:
    """Reads the gate."""
    dtype = torch.float32 if spec.fp32_logits else source.dtype
    bias_E = None
    if spec.has_bias:
        bias_E = read(source, prefix + "e_score_correction_bias", spec.num_experts, dtype=torch.float32)
    linear = read_linear(source, prefix + "weight", spec.num_experts, hidden_size, dtype=dtype)
    return Gate(spec, linear, dtype, bias_E, source.backend)
