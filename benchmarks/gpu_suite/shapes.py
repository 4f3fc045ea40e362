"""The models whose speed is measured, as what their ``config.json`` says, and what differs from the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from moestro.workers.architectures import parse_config
from moestro.workers.model_config import ModelConfig

Raw = dict[str, object]


@dataclass(frozen=True, slots=True)
class Shape:
    """``goals``: the least share of the roof of a decode step by batch, and of prefill under 0."""

    name: str
    raw: Raw
    edit: Callable[[ModelConfig], ModelConfig] = lambda config: config
    differs: str = ""
    goals: Mapping[int, float] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.edit(parse_config(self.raw))


QWEN3_30B_A3B: Raw = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY: Raw = QWEN3_30B_A3B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}
_MIXTRAL: Raw = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_GPT_OSS: Raw = QWEN3_30B_A3B | {
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201_088,
    "rope_theta": 150_000.0,
    "max_position_embeddings": 131_072,
}


def _alternating(config: ModelConfig) -> ModelConfig:
    """Every other layer sees 128 keys, the first of them."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, window=None if index % 2 else 128))
        for index, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape(
                "Qwen3-30B-A3B",
                QWEN3_30B_A3B,
                goals={1: 0.65, 64: 0.70, 256: 0.70, 0: 0.55},
            ),
            Shape("Mixtral-8x7B", _MIXTRAL),
            Shape(
                "gpt-oss-20b",
                _GPT_OSS,
                _alternating,
                "bf16 instead of mxfp4; Qwen3's blocks: head norms, SwiGLU without a clamp, no biases, no sinks",
            ),
            Shape("tiny", TINY),
            Shape("tiny, windows", TINY, _alternating, "as gpt-oss-20b in small"),
        )
    }
)
