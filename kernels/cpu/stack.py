"""All layers of a decoder in one call, where every one of them is made of this folder's kernels; see ``stack.h``.

Legend: T tokens, M model width, Y layers, K experts per token, D rotated width, C slabs of a cache block, N blocks, b
tokens of a block, E experts, L slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moestro.kernels.backend import LayerParts
from moestro.kernels.cpu.attention import CpuAttention
from moestro.kernels.cpu.build import load
from moestro.kernels.cpu.experts import CpuExperts
from moestro.kernels.cpu.gate import cpu_gate
from moestro.kernels.cpu.linear import CpuLinear


@dataclass(frozen=True, slots=True)
class CpuStack:
    """A ``LayerStack``. The bits are those of the layers' kernels called one by one."""

    stack: Any

    def run(
        self,
        x_TM: Tensor,
        cos_T1D: Tensor,
        sin_T1D: Tensor,
        plan_Y: Sequence[Any],
        kv_Y: Sequence[Tensor],
        slot_YE: Sequence[Tensor],
        rows_YL: Sequence[Tensor],
        wants_hidden: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        results: tuple[list[Tensor], Tensor | None] = self.stack.run(
            x_TM, cos_T1D, sin_T1D, plan_Y, kv_Y, slot_YE, rows_YL, wants_hidden
        )
        return results


def make_cpu_stack(layers: Sequence[LayerParts]) -> CpuStack | None:
    """None where a layer holds something of another backend (an odd head width, a gate in fp32)."""
    stack = load().Stack(layers[0].attention_norm_M.shape[0])
    for layer in layers:
        qkv, attention, out, gate, experts = layer.qkv, layer.attention, layer.out, layer.gate, layer.experts
        if not (
            isinstance(qkv, CpuLinear)
            and isinstance(attention, CpuAttention)
            and isinstance(out, CpuLinear)
            and isinstance(gate, CpuLinear)
            and isinstance(experts, CpuExperts)
        ):
            return None
        stack.add(
            layer.attention_norm_M,
            layer.mlp_norm_M,
            layer.eps,
            qkv.packed,
            qkv.bias_O,
            attention.shape,
            attention.weight_ND,
            attention.eps,
            out.packed,
            out.bias_O,
            gate.packed,
            cpu_gate(layer.gate_spec),
            layer.gate_bias_E,
            experts.packed_LP,
            experts.shape.width,
        )
    return CpuStack(stack)
