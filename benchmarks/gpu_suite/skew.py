"""Routing as skewed as traffic may be: a bias on every gate's logits.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moestro.kernels.linear import Linear
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import MoeMlp


@dataclass(frozen=True, slots=True)
class Biased:
    """A gate's product and something on top of it."""

    of: Linear
    bias_E: Tensor

    @property
    def out_features(self) -> int:
        return self.of.out_features

    def apply(self, x_TI: Tensor) -> Tensor:
        return self.of.apply(x_TI) + self.bias_E


def zipf_bias(num_experts: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Log odds of 1, 1/2, 1/3 and so on, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    rank_E = torch.randperm(num_experts, generator=generator) + 1
    return rank_E.double().log().neg().to(device, dtype)


def skewed(decoder: Decoder, seed: int) -> Decoder:
    """The same weights, with a bias of each layer's own on its gate."""

    def biased(mlp: MoeMlp, index: int) -> MoeMlp:
        gate = mlp.gate
        bias_E = zipf_bias(gate.spec.num_experts, seed + index, decoder.cache_spec.device, gate.dtype)
        return replace(mlp, gate=replace(gate, linear=Biased(gate.linear, bias_E)))

    layers = tuple(
        replace(layer, mlp=biased(layer.mlp, index)) if isinstance(layer.mlp, MoeMlp) else layer
        for index, layer in enumerate(decoder.layers)
    )
    return decoder.with_layers(layers)
