"""SwiGLU experts over rows that are sorted by expert.

Legend: R rows, D model width, I expert width, L experts held here; ``counts_L[e]`` rows belong to expert e, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moestro.kernels.activations import swiglu
from moestro.kernels.linear import Linear, can_pack, empty_weight, make_linear

Fill = Callable[[int, Tensor, Tensor], None]


class GroupedExperts(Protocol):
    """y_RD[r] = down(silu(gate(x)) * up(x)) with the weights of row r's expert. Rows beyond ``counts_L.sum()`` are
    padding: they come back with some value, and no other row depends on them."""

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LoopedExperts:
    """One product per expert that has rows. Reads ``counts_L`` on the host: for CPU, and for CUDA where
    ``can_stack`` says no."""

    gate_up_L: tuple[Linear, ...]
    down_L: tuple[Linear, ...]

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        counts = counts_L.tolist()
        used = [e for e, count in enumerate(counts) if count]
        if not used:
            return x_RD
        sizes = [counts[e] for e in used]
        *pieces, padding = torch.split_with_sizes(x_RD, [*sizes, x_RD.shape[0] - sum(sizes)])
        hidden_R2I = torch.cat([self.gate_up_L[e].apply(x) for e, x in zip(used, pieces, strict=True)])
        hidden = torch.split_with_sizes(swiglu(hidden_R2I), sizes)
        return torch.cat([*(self.down_L[e].apply(x) for e, x in zip(used, hidden, strict=True)), padding])


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """All experts in one grouped product (``torch._grouped_mm``): bf16 on CUDA, no synchronisation with the host."""

    gate_up_L2ID: Tensor
    down_LDI: Tensor

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        if x_RD.shape[0] == 0:
            return x_RD
        ends_L = counts_L.cumsum(0).to(torch.int32)
        hidden_R2I = torch._grouped_mm(x_RD, self.gate_up_L2ID.transpose(1, 2), offs=ends_L)
        return torch._grouped_mm(swiglu(hidden_R2I), self.down_LDI.transpose(1, 2), offs=ends_L)


def can_stack(width: int, model_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one grouped product can serve experts of this shape: bf16 on CUDA, every row a multiple of 16 bytes
    (what the tensor memory accelerator of ``torch._grouped_mm``'s kernels can address)."""
    return device.type == "cuda" and dtype == torch.bfloat16 and width % 8 == 0 and model_width % 8 == 0


def make_experts(
    num: int, width: int, model_width: int, dtype: torch.dtype, device: torch.device, fill: Fill
) -> GroupedExperts:
    """Builds ``num`` experts; ``fill(e, gate_up_2ID, down_DI)`` writes expert e's weights into the tensors it is given.

    Where weights are repacked, they pass through the same two tensors one expert after the other.
    """
    if can_pack(device, dtype):
        gate_ups, downs = [], []
        gate_up_2ID = empty_weight(2 * width, model_width, dtype, device)
        down_DI = empty_weight(model_width, width, dtype, device)
        for e in range(num):
            fill(e, gate_up_2ID, down_DI)
            gate_ups.append(make_linear(gate_up_2ID))
            downs.append(make_linear(down_DI))
        return LoopedExperts(tuple(gate_ups), tuple(downs))
    gate_up_L2ID = torch.empty(num, 2 * width, model_width, dtype=dtype, device=device)
    down_LDI = torch.empty(num, model_width, width, dtype=dtype, device=device)
    for e in range(num):
        fill(e, gate_up_L2ID[e], down_LDI[e])
    if can_stack(width, model_width, dtype, device):
        return StackedExperts(gate_up_L2ID, down_LDI)
    return LoopedExperts(
        tuple(make_linear(w) for w in gate_up_L2ID.unbind()), tuple(make_linear(w) for w in down_LDI.unbind())
    )


def experts_reference(x_RD: Tensor, counts_L: Tensor, gate_up_L2ID: Tensor, down_LDI: Tensor) -> Tensor:
    """The definition, row by row, in fp64."""
    expert_R = torch.repeat_interleave(torch.arange(len(counts_L), device=counts_L.device), counts_L)
    rows = []
    for x_D, e in zip(x_RD.double(), expert_R.tolist(), strict=True):
        gate_I, up_I = (gate_up_L2ID[e].double() @ x_D).chunk(2)
        rows.append(down_LDI[e].double() @ (gate_I / (1 + torch.exp(-gate_I)) * up_I))
    return torch.stack(rows).to(x_RD.dtype) if rows else x_RD
