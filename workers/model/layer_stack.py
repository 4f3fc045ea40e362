"""The layers of a decoder, one after another or as one.

Legend: T tokens, M model width, N ranks of the group, G cache groups, D rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from moestro.kernels import backend as kernels
from moestro.kernels.backend import Backend, LayerParts
from moestro.workers.batch import Batch
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.attention import Attention
from moestro.workers.model.mlp import DenseMlp
from moestro.workers.model.moe import LocalMixture, MoeMlp


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; ``group`` says which of the step's plans and tables are its own."""

    attention_norm_M: Tensor
    attention: Attention
    mlp_norm_M: Tensor
    mlp: DenseMlp | MoeMlp
    group: int
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """The step's rotary tables; see ``kernels/rotary.py``."""

    cos_T1D: Tensor
    sin_T1D: Tensor


class LayerStack(Protocol):
    """All layers of a decoder on one rank."""

    @property
    def layers(self) -> tuple[DecoderLayer, ...]: ...

    @property
    def backend(self) -> Backend: ...

    def forward(
        self,
        x_TM: Tensor,
        rotation: Rotation,
        plans_G: Sequence[Any],
        routed_N: tuple[int, ...],
        batch: Batch,
        cache: KVCache,
    ) -> Tensor:
        """The stream after the last layer; ``x_TM`` may be overwritten. Gates and hidden states are shown to
        ``batch.health`` and ``batch.trace``."""


@dataclass(frozen=True, slots=True)
class LoopedStack:
    """Layer by layer: any layers, over any group."""

    layers: tuple[DecoderLayer, ...]
    backend: Backend

    def forward(
        self,
        x_TM: Tensor,
        rotation: Rotation,
        plans_G: Sequence[Any],
        routed_N: tuple[int, ...],
        batch: Batch,
        cache: KVCache,
    ) -> Tensor:
        delta_TM = None
        add_rms_norm = self.backend.add_rms_norm
        for index, (layer, kv_NCbD) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x_TM, h_TM = add_rms_norm(x_TM, delta_TM, layer.attention_norm_M, layer.eps)
            plan = plans_G[layer.group]
            delta_TM = layer.attention.forward(h_TM, rotation.cos_T1D, rotation.sin_T1D, plan, kv_NCbD)
            x_TM, h_TM = add_rms_norm(x_TM, delta_TM, layer.mlp_norm_M, layer.eps)
            if isinstance(layer.mlp, MoeMlp):
                delta_TM = layer.mlp.forward(h_TM, routed_N, partial(batch.health.saw_gate, index))
            else:
                delta_TM = layer.mlp.forward(h_TM)
            if batch.trace is not None:
                batch.trace.take(x_TM + delta_TM)
        return x_TM if delta_TM is None else x_TM + delta_TM


@dataclass(frozen=True, slots=True)
class FusedStack:
    """All layers in one call of the backend: a rank alone, with layers of attention and a mixture and nothing else."""

    layers: tuple[DecoderLayer, ...]
    mixtures: tuple[LocalMixture, ...]
    backend: Backend
    fused: kernels.LayerStack

    def forward(
        self,
        x_TM: Tensor,
        rotation: Rotation,
        plans_G: Sequence[Any],
        routed_N: tuple[int, ...],
        batch: Batch,
        cache: KVCache,
    ) -> Tensor:
        banks = [mixture.bank for mixture in self.mixtures]
        weights, hidden_YTM = self.fused.run(
            x_TM,
            rotation.cos_T1D,
            rotation.sin_T1D,
            [plans_G[layer.group] for layer in self.layers],
            cache.layers,
            [bank.layout.slot_E for bank in banks],
            [bank.rows_L for bank in banks],
            batch.trace is not None,
        )
        for index, weights_TK in enumerate(weights):
            batch.health.saw_gate(index, 0, weights_TK)
        if batch.trace is not None and hidden_YTM is not None:
            for hidden_TM in hidden_YTM:
                batch.trace.take(hidden_TM)
        return x_TM


def make_stack(layers: tuple[DecoderLayer, ...], backend: Backend) -> LayerStack:
    """As one call where the backend has a way for exactly these layers, else layer by layer."""
    parts, mixtures = [], []
    for layer in layers:
        mlp, attention = layer.mlp, layer.attention
        if not (isinstance(mlp, MoeMlp) and isinstance(mlp.mixture, LocalMixture)):
            return LoopedStack(layers, backend)
        if mlp.shared is not None or attention.edits or mlp.tp.size > 1:
            return LoopedStack(layers, backend)
        mixtures.append(mlp.mixture)
        parts.append(
            LayerParts(
                attention_norm_M=layer.attention_norm_M,
                mlp_norm_M=layer.mlp_norm_M,
                eps=layer.eps,
                qkv=attention.qkv,
                attention=attention.kernel,
                out=attention.out,
                gate=mlp.gate.linear,
                gate_spec=mlp.gate.spec,
                gate_bias_E=mlp.gate.bias_E,
                experts=mlp.bank.experts,
            )
        )
    fused = backend.make_stack(parts) if parts else None
    return LoopedStack(layers, backend) if fused is None else FusedStack(layers, tuple(mixtures), backend, fused)
