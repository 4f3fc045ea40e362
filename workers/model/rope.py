"""Rotary frequencies of every variant.

Legend: T tokens, h half of the rotated width.

Dynamic scaling and a paged cache: transformers picks one base per call, from the longest position in it. Here a
token's base follows from its *own* position alone, so that keys in the cache never depend on how a prompt was cut into
chunks or on what else was in the batch. Tokens decoded one by one get the same base either way; the two differ for a
prompt that is itself longer than ``max_position``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.rotary import rotary_tables
from moestro.workers.model_config import DynamicScaling, LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Positions to the tables that a rotation needs."""

    spec: RopeSpec
    inv_freq_h: Tensor  # fp32
    scale: float

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos_T1D and signed sin_T1D, fp32; see ``kernels/rotary.py``."""
        return rotary_tables(self.angles(positions_T), self.scale)

    def angles(self, positions_T: Tensor) -> Tensor:
        """angles_Th, fp32."""
        positions_T1 = positions_T.unsqueeze(1).float()
        if isinstance(self.spec.scaling, DynamicScaling):
            return positions_T1 * self._dynamic_inv_freq(positions_T1, self.spec.scaling)
        return positions_T1 * self.inv_freq_h

    def _dynamic_inv_freq(self, positions_T1: Tensor, scaling: DynamicScaling) -> Tensor:
        dim = self.spec.rotary_dim
        length_T1 = (positions_T1 + 1).clamp(min=scaling.max_position)
        growth_T1 = scaling.factor * length_T1 / scaling.max_position - (scaling.factor - 1)
        # Not ``**``, whose last bit depends on where in a vector an element stands; exp and log have no such tail.
        log_base_T1 = math.log(self.spec.theta) + growth_T1.double().log() * (dim / (dim - 2))
        return torch.exp(-log_base_T1 * _exponents(dim, positions_T1.device)).float()


def make_rope(spec: RopeSpec, device: torch.device) -> Rope:
    """Precomputes what does not depend on positions."""
    inv_freq_h, scale = 1.0 / spec.theta ** _exponents(spec.rotary_dim, torch.device("cpu")), 1.0
    match spec.scaling:
        case LinearScaling(factor):
            inv_freq_h = inv_freq_h / factor
        case Llama3Scaling():
            inv_freq_h = _llama3(inv_freq_h, spec.scaling)
        case YarnScaling():
            inv_freq_h, scale = _yarn(inv_freq_h, spec, spec.scaling), spec.scaling.attention_factor
    return Rope(spec, inv_freq_h.to(device), scale)


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _llama3(inv_freq_h: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths longer than original / low are divided, shorter than original / high kept, linear between."""
    turns_h = scaling.original_max_position * inv_freq_h / (2 * math.pi)  # full turns within the original context
    keep_h = (turns_h - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_h = keep_h.clamp(0, 1)
    return (1 - keep_h) * inv_freq_h / scaling.factor + keep_h * inv_freq_h


def _yarn(inv_freq_h: Tensor, spec: RopeSpec, scaling: YarnScaling) -> Tensor:
    """Dimensions that turn more than beta_fast times within the original context are kept, those that turn less than
    beta_slow times divided by the factor, linear between (section 3.2 of the paper)."""

    def dimension(turns: float) -> float:
        length = scaling.original_max_position
        return spec.rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    span = (high - low) or 0.001
    divide_h = ((torch.arange(len(inv_freq_h), dtype=torch.float32) - low) / span).clamp(0, 1)
    return divide_h * inv_freq_h / scaling.factor + (1 - divide_h) * inv_freq_h
