"""A linear whose bf16 weight lies in panels, multiplied by ``gemm.cpp``.

Legend: T rows, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from moestro.kernels.cpu.build import load


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A ``Linear``. Every output is one fp32 sum over the inputs in their order, so that a row's bits depend on nothing
    but the row and the weight; rows may lie apart (a slice of wider rows)."""

    kernels: ModuleType
    packed: Tensor
    out_features: int
    bias_O: Tensor | None

    def apply(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = self.kernels.linear(x_TI, self.packed, self.out_features, self.bias_O, False)
        return out_TO

    def apply_fp32(self, x_TI: Tensor) -> Tensor:
        """The same sums, not rounded to bf16."""
        out_TO: Tensor = self.kernels.linear(x_TI, self.packed, self.out_features, self.bias_O, True)
        return out_TO


def make_cpu_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> CpuLinear:
    """Packs a bf16 ``weight_OI``, which may then be freed.

    Raises ``BuildError`` where the kernels cannot be built.
    """
    kernels = load()
    bias_O = None if bias_O is None else bias_O.to(torch.bfloat16).contiguous()
    return CpuLinear(kernels, kernels.pack_linear(weight_OI.contiguous()), weight_OI.shape[0], bias_O)
