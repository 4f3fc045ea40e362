"""The table of architectures: a row per Hugging Face class.

A row says how the fields of ``config.json`` become blocks and how our names of weights become the checkpoint's. Our
names are those of Llama and Qwen (``model.layers.3.self_attn.q_proj.weight``, ``...mlp.experts.5.gate_proj.weight``).
The columns' functions are in ``mlp_fields.py`` and ``window_fields.py``. A new architecture made of known blocks is a
new row; one with a new block is a new spec and a block in ``model/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from moestro.protos.errors import CheckpointError
from moestro.workers.config_fields import Fields, parse_dtype, parse_rope
from moestro.workers.mlp_fields import deepseek_moe, dense, mixtral_moe, olmoe_moe, qwen2_moe, qwen_moe
from moestro.workers.model_config import AttentionSpec, DenseSpec, LayerSpec, ModelConfig, MoeSpec, QKNorm
from moestro.workers.window_fields import (
    by_layer_type,
    dots1_window,
    every_layer,
    every_layer_if_used,
    from_max_window_layers,
    no_window,
    qwen2_moe_slides,
    unless_null,
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row."""

    mlp: Callable[[Fields, int], DenseSpec | MoeSpec]  # of a layer
    window: Callable[[Fields, int], int | None]  # of a layer
    qk_norm: QKNorm = QKNorm.NONE
    qk_norm_if: str | None = None  # the flag that turns it on, off where absent
    bias: tuple[str | bool, str | bool] = (False, False)  # of q, k, v and of o: a field's name, or the answer
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_theta: float = 10_000.0
    default_eps: float = 1e-6
    partial_rotary: float | None = None  # the default of partial_rotary_factor, in classes that have it
    draft_layers: str | None = None  # the field that counts further layers, which draft tokens; 1 where absent
    renames: tuple[tuple[str, str], ...] = ()  # ours -> the checkpoint's, replaced within a name

    def checkpoint_name(self, name: str) -> str:
        for ours, theirs in self.renames:
            name = name.replace(ours, theirs)
        return name


_SHARED_EXPERTS = ((".shared_expert.", ".shared_experts."),)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "MixtralForCausalLM": Architecture(
            mlp=mixtral_moe,
            window=every_layer,
            default_theta=1_000_000.0,
            default_eps=1e-5,
            renames=(
                (".mlp.", ".block_sparse_moe."),
                (".gate_proj.", ".w1."),
                (".down_proj.", ".w2."),
                (".up_proj.", ".w3."),
            ),
        ),
        "Qwen2MoeForCausalLM": Architecture(
            mlp=qwen2_moe, window=by_layer_type(qwen2_moe_slides), bias=("qkv_bias", False)
        ),
        "Qwen3MoeForCausalLM": Architecture(
            mlp=qwen_moe,
            window=every_layer_if_used,
            qk_norm=QKNorm.HEAD,
            bias=("attention_bias", "attention_bias"),
        ),
        "OlmoeForCausalLM": Architecture(
            mlp=olmoe_moe,
            window=no_window,
            qk_norm=QKNorm.FULL,
            bias=("attention_bias", "attention_bias"),
            default_eps=1e-5,
        ),
        "Dots1ForCausalLM": Architecture(
            mlp=deepseek_moe(first_dense=0, renormalize=False),
            window=dots1_window,
            qk_norm=QKNorm.HEAD,
            bias=("attention_bias", "attention_bias"),
            renames=_SHARED_EXPERTS,
        ),
        "Glm4MoeForCausalLM": Architecture(
            mlp=deepseek_moe(first_dense=1, renormalize=True),
            window=no_window,
            qk_norm=QKNorm.HEAD,
            qk_norm_if="use_qk_norm",
            bias=("attention_bias", False),
            default_eps=1e-5,
            partial_rotary=0.5,
            draft_layers="num_nextn_predict_layers",
            renames=_SHARED_EXPERTS,
        ),
        "LlamaForCausalLM": Architecture(mlp=dense, window=no_window, bias=("attention_bias", "attention_bias")),
        "MistralForCausalLM": Architecture(mlp=dense, window=unless_null),
        "Qwen3ForCausalLM": Architecture(
            mlp=dense,
            window=by_layer_type(from_max_window_layers(28)),
            qk_norm=QKNorm.HEAD,
            bias=("attention_bias", "attention_bias"),
            default_head_dim=128,
        ),
    }
)


def parse_config(raw: Mapping[str, object], source: str = "config.json") -> ModelConfig:
    """The decoder that a ``config.json`` describes. Raises CheckpointError with the reason why it cannot be served."""
    fields = Fields(raw, source)
    if fields.has("auto_map"):
        raise fields.error("auto_map", "asks for code from the checkpoint to be run; that is never done")
    if fields.has("quantization_config"):
        raise fields.error("quantization_config", "is set: quantized checkpoints are not supported yet")
    names = fields.strings("architectures")
    if not names or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise fields.error(
            "architectures", f"must be one of {', '.join(ARCHITECTURES)}, not {raw.get('architectures')!r}"
        )
    row = ARCHITECTURES[names[0]]
    if raw.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", f"must be 'silu', not {raw['hidden_act']!r}")
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    attention = _attention(row, fields, hidden_size)
    return ModelConfig(
        architecture=names[0],
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(
            LayerSpec(replace(attention, window=row.window(fields, layer)), row.mlp(fields, layer))
            for layer in range(num_layers)
        ),
        rope=parse_rope(fields, attention.head_dim, row.default_theta, row.partial_rotary),
        norm_eps=fields.number("rms_norm_eps", row.default_eps),
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=parse_dtype(fields),
        eos_token_ids=fields.integers("eos_token_id"),
        num_draft_layers=fields.integer(row.draft_layers, 1, minimum=0) if row.draft_layers else 0,
    )


def _attention(row: Architecture, fields: Fields, hidden_size: int) -> AttentionSpec:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads {num_heads}, not {num_kv_heads}")
    if not fields.has("head_dim") and row.default_head_dim is None and hidden_size % num_heads:
        raise fields.error("num_attention_heads", f"must divide hidden_size {hidden_size}, not {num_heads}")
    head_dim = fields.integer("head_dim", row.default_head_dim or hidden_size // num_heads)
    qkv_bias, out_bias = (
        # Qwen2-MoE's qkv_bias is true where absent; every other bias is off.
        fields.flag(bias, bias == "qkv_bias") if isinstance(bias, str) else bias
        for bias in row.bias
    )
    has_norm = row.qk_norm_if is None or fields.flag(row.qk_norm_if, False)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=row.qk_norm if has_norm else QKNorm.NONE,
        clip_qkv=fields.number("clip_qkv") if row.qk_norm is QKNorm.FULL and fields.has("clip_qkv") else None,
    )


def architecture_of(config: ModelConfig) -> Architecture:
    """The row of a config."""
    try:
        return ARCHITECTURES[config.architecture]
    except KeyError:
        raise CheckpointError(
            f"architecture {config.architecture!r} is not one of {', '.join(ARCHITECTURES)}"
        ) from None
