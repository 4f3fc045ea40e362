"""Dense SwiGLU.

Legend: T tokens, M model width, W this rank's share of the inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.activations import swiglu
from moestro.kernels.linear import Linear
from moestro.router.parallel import TensorParallel
from moestro.workers.model.sharding import even_shard
from moestro.workers.model.weights import WeightSource, read, read_linear
from moestro.workers.model_config import DenseSpec


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """Column-parallel gate and up as one product, row-parallel down."""

    gate_up: Linear
    down: Linear
    tp: TensorParallel

    def forward(self, x_TM: Tensor) -> Tensor:
        """y_TM. Collective within the tensor-parallel set."""
        return self.tp.sum(self.down.apply(swiglu(self.gate_up.apply(x_TM))))


def build_mlp(spec: DenseSpec, hidden_size: int, prefix: str, source: WeightSource, tp: TensorParallel) -> DenseMlp:
    """Reads this rank's share. Raises ConfigError when the width cannot be shared equally."""
    start, width = even_shard("intermediate_size", spec.width, tp.rank, tp.size)
    gate_up_2WM = source.backend.empty_weight(2 * width, hidden_size, source.dtype, source.device)
    bias_2W = torch.empty(2 * width, dtype=source.dtype, device=source.device) if spec.bias else None
    for half, part in ((slice(0, width), "gate"), (slice(width, None), "up")):
        source.read_(gate_up_2WM[half], f"{prefix}{part}_proj.weight", row=start)
        if bias_2W is not None:
            source.read_(bias_2W[half], f"{prefix}{part}_proj.bias", row=start)
    gate_up = source.backend.make_linear(gate_up_2WM, bias_2W)
    del gate_up_2WM
    # The ranks' results are added, so one of them brings the bias.
    down_bias = read(source, prefix + "down_proj.bias", hidden_size) if spec.bias and tp.rank == 0 else None
    down = read_linear(source, prefix + "down_proj.weight", hidden_size, width, column=start, bias_O=down_bias)
    return DenseMlp(gate_up, down, tp)
