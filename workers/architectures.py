"""The table of architectures: a row per Hugging Face class.

A row says how the fields of ``config.json`` become blocks and how our names of weights become the checkpoint's. Our
names are those of Llama and Qwen (``model.layers.3.self_attn.q_proj.weight``, ``...mlp.experts.5.gate_proj.weight``).
A new architecture made of known blocks is a new row; one with a new block is a new spec and a block in ``model/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from moestro.protos.errors import CheckpointError
from moestro.router.gate import GateSpec
from moestro.workers.config_fields import Fields, parse_dtype, parse_rope
from moestro.workers.model_config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoeSpec,
    QKNorm,
    SharedSpec,
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row."""

    mlp: Callable[[Fields, int], DenseSpec | MoeSpec]  # of a layer
    window: Callable[[Fields, int], int | None]  # of a layer
    qk_norm: QKNorm = QKNorm.NONE
    bias: tuple[str | bool, str | bool] = (False, False)  # of q, k, v and of o: a field's name, or the answer
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_theta: float = 10_000.0
    default_eps: float = 1e-6
    renames: tuple[tuple[str, str], ...] = ()  # ours -> the checkpoint's, replaced within a name

    def checkpoint_name(self, name: str) -> str:
        for ours, theirs in self.renames:
            name = name.replace(ours, theirs)
        return name


def _dense(fields: Fields, layer: int) -> DenseSpec:
    return DenseSpec(fields.integer("intermediate_size"), fields.flag("mlp_bias", False))


def _gate(fields: Fields, renormalize: bool) -> GateSpec:
    # transformers 5 writes num_local_experts where older releases wrote num_experts, and the reverse.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    num_experts, top_k = fields.integer(name), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"must be at most {name} {num_experts}, not {top_k}")
    return GateSpec(num_experts, top_k, renormalize)


def _mixtral_moe(fields: Fields, layer: int) -> MoeSpec:
    return MoeSpec(_gate(fields, renormalize=True), fields.integer("intermediate_size"))


def _olmoe_moe(fields: Fields, layer: int) -> MoeSpec:
    return MoeSpec(_gate(fields, fields.flag("norm_topk_prob", False)), fields.integer("intermediate_size"))


def _qwen_moe(fields: Fields, layer: int) -> DenseSpec | MoeSpec:
    if layer in fields.integers("mlp_only_layers") or (layer + 1) % fields.integer("decoder_sparse_step", 1):
        return DenseSpec(fields.integer("intermediate_size"))
    return MoeSpec(_gate(fields, fields.flag("norm_topk_prob", False)), fields.integer("moe_intermediate_size"))


def _qwen2_moe(fields: Fields, layer: int) -> DenseSpec | MoeSpec:
    mlp = _qwen_moe(fields, layer)
    if isinstance(mlp, DenseSpec):
        return mlp
    return replace(mlp, shared=SharedSpec(fields.integer("shared_expert_intermediate_size"), gated=True))


def _no_window(fields: Fields, layer: int) -> None:
    return None


def _every_layer(fields: Fields, layer: int) -> int | None:
    return fields.integer("sliding_window") if fields.has("sliding_window") else None


def _mistral_window(fields: Fields, layer: int) -> int | None:
    # Mistral's class has a window of 4096 where the field is absent; null turns it off.
    return _every_layer(fields, layer) if "sliding_window" in fields.raw else 4096


def _every_layer_if_used(fields: Fields, layer: int) -> int | None:
    return fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None


def _by_layer_type(slides: Callable[[Fields, int], bool]) -> Callable[[Fields, int], int | None]:
    """The window where ``layer_types`` says so; configs from before that field follow ``slides``."""

    def window(fields: Fields, layer: int) -> int | None:
        if not fields.flag("use_sliding_window", False):
            return None
        types = fields.strings("layer_types")
        if types is None:
            sliding = slides(fields, layer)
        elif layer >= len(types) or types[layer] not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"must say full_attention or sliding_attention for layer {layer}")
        else:
            sliding = types[layer] == "sliding_attention"
        return fields.integer("sliding_window", 4096) if sliding else None

    return window


def _qwen2_moe_slides(fields: Fields, layer: int) -> bool:
    return layer % 2 == 0 and layer < fields.integer("max_window_layers", 28, minimum=0)


def _qwen3_slides(fields: Fields, layer: int) -> bool:
    return layer >= fields.integer("max_window_layers", 28, minimum=0)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "MixtralForCausalLM": Architecture(
            mlp=_mixtral_moe,
            window=_every_layer,
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
            mlp=_qwen2_moe, window=_by_layer_type(_qwen2_moe_slides), bias=("qkv_bias", False)
        ),
        "Qwen3MoeForCausalLM": Architecture(
            mlp=_qwen_moe,
            window=_every_layer_if_used,
            qk_norm=QKNorm.HEAD,
            bias=("attention_bias", "attention_bias"),
        ),
        "OlmoeForCausalLM": Architecture(
            mlp=_olmoe_moe,
            window=_no_window,
            qk_norm=QKNorm.FULL,
            bias=("attention_bias", "attention_bias"),
            default_eps=1e-5,
        ),
        "LlamaForCausalLM": Architecture(mlp=_dense, window=_no_window, bias=("attention_bias", "attention_bias")),
        "MistralForCausalLM": Architecture(mlp=_dense, window=_mistral_window),
        "Qwen3ForCausalLM": Architecture(
            mlp=_dense,
            window=_by_layer_type(_qwen3_slides),
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
        rope=parse_rope(fields, attention.head_dim, row.default_theta),
        norm_eps=fields.number("rms_norm_eps", row.default_eps),
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=parse_dtype(fields),
        eos_token_ids=fields.integers("eos_token_id"),
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
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=row.qk_norm,
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
