"""How experts' weights are stored on CUDA: bf16, or e4m3 with a scale for each block of 128 x 128 (DeepSeek-V3's
format).

Legend: L slots, O outputs and H inputs of one product, o and h blocks of 128 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.grouped_experts import take_slots

BLOCK = 128
_LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, slots=True)
class Activation:
    """``gate * sigmoid(alpha * gate) * (up + up_shift)``; with a limit gate is cut to at most that and up to between
    that and its negative."""

    alpha: float = 1.0
    limit: float = 0.0  # 0: none
    up_shift: float = 0.0


SILU = Activation()
CLAMPED_SWIGLU = Activation(1.702, 7.0, 1.0)
"""Of gpt-oss."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One of the two products of one expert, or of all: then the slots come first in every tensor."""

    weight_OH: Tensor  # bf16 or e4m3
    scale_oh: Tensor | None = None  # fp32; of e4m3
    bias_O: Tensor | None = None  # bf16

    def __getitem__(self, slot: int) -> ExpertWeights:
        scale, bias = self.scale_oh, self.bias_O
        return ExpertWeights(
            self.weight_OH[slot], None if scale is None else scale[slot], None if bias is None else bias[slot]
        )

    def fill_(self, weight_OH: Tensor) -> None:
        """Stores bf16 weights as e4m3."""
        assert self.scale_oh is not None
        quantized_OH, scale_oh = quantize(weight_OH)
        self.weight_OH.copy_(quantized_OH)
        self.scale_oh.copy_(scale_oh)

    def copy_(self, other: ExpertWeights) -> None:
        """Takes the weights of one in the same format."""
        self.weight_OH.copy_(other.weight_OH)
        if self.scale_oh is not None and other.scale_oh is not None:
            self.scale_oh.copy_(other.scale_oh)
        if self.bias_O is not None and other.bias_O is not None:
            self.bias_O.copy_(other.bias_O)

    def with_slots(self, sources: Sequence[int | None]) -> ExpertWeights:
        """Of all slots: a copy with one slot for each source, zeros where it is None."""
        scale, bias = self.scale_oh, self.bias_O
        return ExpertWeights(
            take_slots(self.weight_OH, sources),
            None if scale is None else take_slots(scale, sources),
            None if bias is None else take_slots(bias, sources),
        )

    def empty_one(self) -> ExpertWeights:
        """Of one slot, unfilled but for a bias of zeros."""
        one = self[0]
        return ExpertWeights(
            torch.empty_like(one.weight_OH),
            None if one.scale_oh is None else torch.empty_like(one.scale_oh),
            None if one.bias_O is None else torch.zeros_like(one.bias_O),
        )


def zero_weights(
    num_slots: int, out_features: int, in_features: int, device: torch.device, *, fp8: bool, bias: bool = False
) -> ExpertWeights:
    shape = (num_slots, out_features, in_features)
    bias_LO = torch.zeros(shape[:2], dtype=torch.bfloat16, device=device) if bias else None
    if not fp8:
        return ExpertWeights(torch.zeros(shape, dtype=torch.bfloat16, device=device), None, bias_LO)
    scale_Loh = torch.ones(num_slots, -(-out_features // BLOCK), -(-in_features // BLOCK), device=device)
    return ExpertWeights(torch.zeros(shape, device=device).to(torch.float8_e4m3fn), scale_Loh, bias_LO)


def quantize(weight_OH: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 weights and the fp32 scales that make the largest of each block 448."""
    num_o, num_h = (-(-size // BLOCK) for size in weight_OH.shape)
    padded = weight_OH.new_zeros(num_o * BLOCK, num_h * BLOCK, dtype=torch.float32)
    padded[: weight_OH.shape[0], : weight_OH.shape[1]] = weight_OH
    blocks_oOhH = padded.view(num_o, BLOCK, num_h, BLOCK)
    scale_oh = blocks_oOhH.abs().amax((1, 3)).clamp_min(1e-30) / _LARGEST
    scaled = (blocks_oOhH / scale_oh[:, None, :, None]).view(padded.shape)
    return scaled[: weight_OH.shape[0], : weight_OH.shape[1]].to(torch.float8_e4m3fn), scale_oh


def dequantize(weight_OH: Tensor, scale_oh: Tensor) -> Tensor:
    """In fp64: what the kernels multiply with."""
    scale_OH = scale_oh.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight_OH.double() * scale_OH[: weight_OH.shape[0], : weight_OH.shape[1]]
