"""Small random models of transformers' own classes: one for every row of the table of architectures.

Shared by the tests and by ``benchmarks.gpu_suite``, which checks the same models on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 101

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_DEEPSEEK = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}

# Every row of the table of architectures, with the options that make it differ from the others.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        _QWEN_MOE
        | {
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", _QWEN_MOE | {"head_dim": 24, "attention_bias": True}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5}),
    "dots1": (
        "Dots1",
        _DEEPSEEK
        | {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 11,
            "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        _DEEPSEEK | {"first_k_dense_replace": 1, "head_dim": 24, "use_qk_norm": True, "attention_bias": True},
    ),
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def make_model(name: str, seed: int = 0, **options: object) -> transformers.PreTrainedModel:
    """A random model in fp32. Weights are wide enough for attention, gates and logits to be far from uniform."""
    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **own, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    return model


def save_model(model: transformers.PreTrainedModel, folder: Path, **options: object) -> Path:
    """Writes an ordinary checkpoint folder; returns it."""
    model.save_pretrained(folder, **options)
    return folder


def random_ids(length: int, seed: int) -> list[int]:
    """Token ids below VOCAB_SIZE."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
