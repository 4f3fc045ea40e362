"""A checkpoint whose tokens have themes, and whose experts belong to them.

A quarter of the vocabulary and a quarter of the experts share a direction in the residual stream: tokens of a theme go
to its experts in every layer and are followed by tokens of the same theme. So a workload of one theme uses a quarter of
the experts, and a change of workload uses others. Everything else is random.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

NUM_THEMES = 4
VOCABULARY = 2048
EXPERTS = 16
_STRENGTH = 6.0  # of the theme in an embedding whose other numbers are of size 1


def checkpoint(folder: Path, seed: int = 0, *, hidden: int = 512, width: int = 3072, layers: int = 4) -> Path:
    """The folder of the checkpoint, bf16, written by transformers on first use."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    target = folder / f"themed-{hidden}-{width}-{layers}-{seed}"
    if (target / "config.json").exists():
        return target
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        intermediate_size=width,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        decoder_sparse_step=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3MoeForCausalLM(config)
    directions = torch.linalg.qr(torch.randn(hidden, NUM_THEMES)).Q.T * hidden**0.5
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_()
        embedding += _STRENGTH * directions.repeat_interleave(VOCABULARY // NUM_THEMES, 0)
        for layer in model.model.layers:
            # The theme picks the quarter, the rest of a token the experts within it: the random part of a gate
            # does not see themes, or all tokens of one would pick the same two.
            gate = layer.mlp.gate.weight
            gate.normal_(std=hidden**-0.5)
            gate -= gate @ directions.T @ directions / hidden
            gate += directions.repeat_interleave(EXPERTS // NUM_THEMES, 0) / hidden * 16
    model.to(torch.bfloat16).save_pretrained(target)
    return target


def prompt(themes: tuple[int, ...], length: int, rng: random.Random) -> list[int]:
    """Random tokens of one of the themes."""
    share = VOCABULARY // NUM_THEMES
    first = rng.choice(themes) * share
    return [rng.randrange(first, first + share) for _ in range(length)]
