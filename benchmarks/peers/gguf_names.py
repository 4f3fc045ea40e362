"""Qwen3-MoE in llama.cpp's terms: which tensor is called what, and the hyperparameters. The writer is gguf_file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

ARCHITECTURE = "qwen3moe"

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT_NAME = re.compile(r"mlp\.experts\.(\d+)\.(\w+)")

FP32 = re.compile(r"norm\.weight$|ffn_gate_inp\.weight$")  # llama.cpp keeps norms and the gate in fp32


def gguf_sources(names: Iterable[str]) -> dict[str, list[str]]:
    """For each GGUF tensor the checkpoint's tensors it is made of: one, or a layer's experts in order, to be stacked.
    Raises ValueError for a name that is not Qwen3-MoE's."""
    sources: dict[str, dict[int, str]] = {}
    for name in names:
        target, expert = _target(name)
        sources.setdefault(target, {})[expert] = name
    return {target: [parts[index] for index in sorted(parts)] for target, parts in sources.items()}


def _target(name: str) -> tuple[str, int]:
    if name in _WHOLE:
        return _WHOLE[name], 0
    if found := _LAYER_NAME.fullmatch(name):
        layer, rest = found.groups()
        if rest in _LAYER:
            return f"blk.{layer}.{_LAYER[rest]}.weight", 0
        if (expert := _EXPERT_NAME.fullmatch(rest)) and expert[2] in _EXPERT:
            return f"blk.{layer}.{_EXPERT[expert[2]]}.weight", int(expert[1])
    raise ValueError(f"no Qwen3-MoE tensor is called {name}")


def hyperparameters(config: Mapping[str, Any]) -> dict[str, int | float]:
    """The keys of the GGUF header, without the architecture's prefix, from a Hugging Face ``config.json``."""
    experts = config.get("num_experts", config.get("num_local_experts"))
    rope = config.get("rope_parameters") or {}
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta"))),
        "expert_count": int(experts),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
