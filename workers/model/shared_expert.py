"""The expert that every token goes to, beside those that a gate chooses.

Legend: T tokens, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moestro.kernels.activations import sigmoid
from moestro.kernels.linear import Linear
from moestro.router.parallel import NoTensorParallel
from moestro.workers.model.mlp import DenseMlp, build_mlp
from moestro.workers.model.weights import WeightSource, read_linear
from moestro.workers.model_config import DenseSpec, SharedSpec


@dataclass(frozen=True, slots=True)
class GatedExpert:
    """Scaled by the sigmoid of a gate of its own (Qwen2-MoE)."""

    mlp: DenseMlp
    gate: Linear

    def forward(self, x_TM: Tensor) -> Tensor:
        """y_TM."""
        return sigmoid(self.gate.apply(x_TM)) * self.mlp.forward(x_TM)


SharedExpert = DenseMlp | GatedExpert


def build_shared_expert(spec: SharedSpec, hidden_size: int, prefix: str, source: WeightSource) -> SharedExpert:
    """Reads it whole, for every rank: it works on the rank's own share of the tokens."""
    mlp = build_mlp(DenseSpec(spec.width), hidden_size, prefix + "shared_expert.", source, NoTensorParallel())
    if not spec.gated:
        return mlp
    return GatedExpert(mlp, read_linear(source, prefix + "shared_expert_gate.weight", 1, hidden_size))
