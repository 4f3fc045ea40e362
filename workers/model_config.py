"""What a decoder is made of, as frozen data: one small part per block.

A Hugging Face ``config.json`` becomes a ``ModelConfig`` in ``architectures.py``; nothing below it reads JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moestro.kernels.gate import GateSpec


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK-aware base that grows with the length beyond ``max_position``."""

    factor: float
    max_position: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): a ramp over dimensions between kept and divided frequencies."""

    factor: float
    original_max_position: int
    attention_factor: float  # cos and sin are multiplied by it
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first ``rotary_dim`` of each head's dimensions."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


class QKNorm(Enum):
    """RMS norm of queries and keys before rope."""

    NONE = "none"
    HEAD = "head"  # each head on its own, one weight for all heads (Qwen3)
    FULL = "full"  # over the whole projection (OLMoE)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention (Ainslie et al. 2023). Its cache holds keys and values of ``num_kv_heads`` heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    clip_qkv: float | None = None
    window: int | None = None  # a query sees itself and the window - 1 tokens before it


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """SwiGLU."""

    width: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class SharedSpec:
    """A SwiGLU expert for every token. Its output is scaled by the sigmoid of a gate of its own if ``gated``
    (Qwen2-MoE). Several shared experts without a gate (DeepSeek) are one of their joint ``width``."""

    width: int
    gated: bool


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """SwiGLU experts of ``width`` behind a gate, and the shared one, which is added to their result."""

    gate: GateSpec
    width: int
    shared: SharedSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention, then a feed-forward part, each behind an RMS norm and added to the residual stream."""

    attention: AttentionSpec
    mlp: DenseSpec | MoeSpec


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole decoder."""

    architecture: str  # the row of the table, which is the Hugging Face class name
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    max_position: int
    tie_embeddings: bool = False
    dtype: torch.dtype = torch.bfloat16  # what the checkpoint says it was saved in
    eos_token_ids: tuple[int, ...] = ()
    num_draft_layers: int = 0  # layers after the last that draft tokens: they may be in the checkpoint and are not read

    @property
    def windows(self) -> tuple[int | None, ...]:
        """One entry per cache group, in the order in which the layers first use them."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.layers))

    @property
    def num_experts(self) -> int:
        """Logical experts of a mixture layer; 0 for a dense model. All mixture layers have as many."""
        return next((layer.mlp.gate.num_experts for layer in self.layers if isinstance(layer.mlp, MoeSpec)), 0)

    @property
    def top_k(self) -> int:
        """Experts of a token; the most of any mixture layer, 0 for a dense model."""
        return max((layer.mlp.gate.top_k for layer in self.layers if isinstance(layer.mlp, MoeSpec)), default=0)

    @property
    def num_expert_groups(self) -> int:
        """Groups that the gate of a mixture layer picks from; 1 where it knows none."""
        gates = (layer.mlp.gate for layer in self.layers if isinstance(layer.mlp, MoeSpec))
        return next((gate.groups.num_groups for gate in gates if gate.groups is not None), 1)

    @property
    def num_moe_layers(self) -> int:
        return sum(isinstance(layer.mlp, MoeSpec) for layer in self.layers)
