"""Where a block gets its weights from, and which weights a decoder has.

Legend: O output features, I input features, V vocabulary, M model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moestro.kernels.backend import Backend
from moestro.kernels.linear import Linear
from moestro.workers.model_config import AttentionSpec, DenseSpec, ModelConfig, MoeSpec, QKNorm


class WeightSource(Protocol):
    """Hands out pieces of named tensors. Names are ours (see ``architectures.py``); every tensor has one or two
    dimensions."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def backend(self) -> Backend:
        """Whose operations the model is made of."""

    def read_(self, out: Tensor, name: str, row: int = 0, column: int = 0) -> None:
        """Fills ``out`` with the piece of ``name`` of out's shape that starts at (row, column)."""


def read(
    source: WeightSource, name: str, *shape: int, row: int = 0, column: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """A new tensor with a piece of ``name``, in the source's dtype unless another is asked for."""
    out = torch.empty(shape, dtype=dtype or source.dtype, device=source.device)
    source.read_(out, name, row, column)
    return out


def read_linear(
    source: WeightSource,
    name: str,
    out_features: int,
    in_features: int,
    *,
    row: int = 0,
    column: int = 0,
    bias_O: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Linear:
    """A linear from a piece of ``name``, in the source's dtype unless another is asked for."""
    weight_OI = source.backend.empty_weight(out_features, in_features, dtype or source.dtype, source.device)
    source.read_(weight_OI, name, row, column)
    return source.backend.make_linear(weight_OI, bias_O)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config has, by our names. A tied LM head is not among them."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for index, layer in enumerate(config.layers):
        prefix = f"model.layers.{index}."
        shapes[prefix + "input_layernorm.weight"] = (width,)
        shapes[prefix + "post_attention_layernorm.weight"] = (width,)
        shapes |= _attention_shapes(layer.attention, width, prefix + "self_attn.")
        if isinstance(layer.mlp, DenseSpec):
            shapes |= _mlp_shapes(layer.mlp, width, prefix + "mlp.")
        else:
            shapes |= _moe_shapes(layer.mlp, width, prefix + "mlp.")
    shapes["model.norm.weight"] = (width,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _attention_shapes(spec: AttentionSpec, width: int, prefix: str) -> dict[str, tuple[int, ...]]:
    rows = {"q": spec.num_heads * spec.head_dim, "k": spec.num_kv_heads * spec.head_dim}
    rows["v"] = rows["k"]
    shapes: dict[str, tuple[int, ...]] = {}
    for part, num_rows in rows.items():
        shapes[f"{prefix}{part}_proj.weight"] = (num_rows, width)
        if spec.qkv_bias:
            shapes[f"{prefix}{part}_proj.bias"] = (num_rows,)
    shapes[prefix + "o_proj.weight"] = (width, rows["q"])
    if spec.out_bias:
        shapes[prefix + "o_proj.bias"] = (width,)
    if spec.qk_norm is QKNorm.HEAD:
        shapes |= {f"{prefix}{part}_norm.weight": (spec.head_dim,) for part in "qk"}
    elif spec.qk_norm is QKNorm.FULL:
        shapes |= {f"{prefix}{part}_norm.weight": (rows[part],) for part in "qk"}
    return shapes


def _mlp_shapes(spec: DenseSpec, width: int, prefix: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part, shape in (("gate", (spec.width, width)), ("up", (spec.width, width)), ("down", (width, spec.width))):
        shapes[f"{prefix}{part}_proj.weight"] = shape
        if spec.bias:
            shapes[f"{prefix}{part}_proj.bias"] = shape[:1]
    return shapes


def _moe_shapes(spec: MoeSpec, width: int, prefix: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {prefix + "gate.weight": (spec.gate.num_experts, width)}
    if spec.gate.has_bias:
        shapes[prefix + "gate.e_score_correction_bias"] = (spec.gate.num_experts,)
    for expert in range(spec.gate.num_experts):
        shapes |= _mlp_shapes(DenseSpec(spec.width), width, f"{prefix}experts.{expert}.")
    if spec.shared is not None:
        shapes |= _mlp_shapes(DenseSpec(spec.shared.width), width, prefix + "shared_expert.")
        if spec.shared.gated:
            shapes[prefix + "shared_expert_gate.weight"] = (1, width)
    return shapes
