"""The gate against transformers' routers and against its own rule for ties."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moestro.router.gate import softmax_topk

ROUTERS = [
    (MixtralTopKRouter, transformers.MixtralConfig, True, {"num_local_experts": 24}),
    (Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig, False, {"num_experts": 24}),
    (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig, True, {"num_experts": 24, "norm_topk_prob": True}),
    (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig, False, {"num_experts": 24, "norm_topk_prob": False}),
    (OlmoeTopKRouter, transformers.OlmoeConfig, False, {"num_experts": 24}),
]


@pytest.mark.parametrize(("router_class", "config_class", "renormalize", "options"), ROUTERS)
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_same_experts_and_weights_as_transformers(router_class, config_class, renormalize, options, num_tokens):
    generator = torch.Generator().manual_seed(0)
    router = router_class(config_class(hidden_size=16, num_experts_per_tok=5, **options))
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        x_TD = torch.randn(num_tokens, 16, generator=generator)
        logits_TE, want_weights_TK, want_ids_TK = router(x_TD)
    ids_TK, weights_TK = softmax_topk(logits_TE, 5, renormalize)
    assert torch.equal(ids_TK, want_ids_TK)
    torch.testing.assert_close(weights_TK, want_weights_TK, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_experts", [4, 64, 512])
def test_among_equals_the_smaller_id_comes_first(num_experts):
    generator = torch.Generator().manual_seed(num_experts)
    logits_TE = torch.randint(0, 3, (200, num_experts), generator=generator).float()
    ids_TK, _ = softmax_topk(logits_TE, 4, renormalize=True)
    for logits_E, ids_K in zip(logits_TE.tolist(), ids_TK.tolist(), strict=True):
        assert ids_K == sorted(range(num_experts), key=lambda e: (-logits_E[e], e))[:4]


def test_ids_are_distinct_and_weights_in_order_for_extreme_logits():
    logits_TE = torch.tensor(
        [[-1e30, 1e30, 0.0, 0.0], [float("-inf"), 0.0, 3.0, float("-inf")], [-0.0, 0.0, -0.0, 0.0]]
    )
    ids_TK, weights_TK = softmax_topk(logits_TE, 3, renormalize=False)
    assert ids_TK.tolist() == [[1, 0, 2], [2, 1, 0], [0, 1, 2]]
    assert (weights_TK[:, :-1] >= weights_TK[:, 1:]).all()
    nan_ids_TK, _ = softmax_topk(torch.full((2, 8), float("nan")), 3, renormalize=True)
    assert all(len(set(row)) == 3 for row in nan_ids_TK.tolist())
