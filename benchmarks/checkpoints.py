"""The random Qwen3-MoE checkpoints every CPU benchmark runs on, and nothing downloaded.

``tiny`` is 114M parameters, ``mid`` 865M; shapes as in the published comparison of peers on two cores.
"""

from __future__ import annotations

from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    "mid": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    },
}


def checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """The folder of checkpoint ``name`` in bf16, written by transformers on first use."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    target = folder / f"{name}-{seed}"
    if (target / "config.json").exists():
        return target
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **SHAPES[name],
        intermediate_size=SHAPES[name]["moe_intermediate_size"],
        max_position_embeddings=4096,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    return target
