"""The gate against transformers' routers, and against the definitions of its own rules: ties, rows, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moestro.kernels.gate import GateSpec, GroupSpec, Score, route

SOFTMAX = [
    (MixtralTopKRouter, transformers.MixtralConfig, True, {"num_local_experts": 24}),
    (Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig, False, {"num_experts": 24}),
    (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig, True, {"num_experts": 24, "norm_topk_prob": True}),
    (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig, False, {"num_experts": 24, "norm_topk_prob": False}),
    (OlmoeTopKRouter, transformers.OlmoeConfig, False, {"num_experts": 24}),
    (OlmoeTopKRouter, transformers.OlmoeConfig, True, {"num_experts": 24, "norm_topk_prob": True}),
]
SIGMOID = [
    (DeepseekV3TopkRouter, transformers.DeepseekV3Config),
    (Glm4MoeTopkRouter, transformers.Glm4MoeConfig),
    (Dots1TopkRouter, transformers.Dots1Config),
]
# experts, experts per token, groups, groups per token
GROUPED = [(24, 5, 1, 1), (24, 5, 4, 2), (24, 12, 4, 2), (32, 1, 8, 1), (24, 5, 12, 5), (256, 8, 8, 4)]


def deepseek(num_experts: int, top_k: int, num_groups: int, group_top_k: int, renormalize: bool = True) -> GateSpec:
    groups = GroupSpec(num_groups, group_top_k)
    return GateSpec(num_experts, top_k, renormalize, Score.SIGMOID, has_bias=True, groups=groups, scaling=2.5)


SPECS = {
    "softmax": GateSpec(60, 5, renormalize=False),
    "softmax, renormalized": GateSpec(24, 5, renormalize=True),
    "softmax, biased": GateSpec(24, 5, renormalize=True, has_bias=True, scaling=0.5),
    "softmax, grouped": GateSpec(24, 5, renormalize=True, groups=GroupSpec(6, 3)),
    "sigmoid": GateSpec(24, 5, renormalize=False, score=Score.SIGMOID),
    "sigmoid, biased": GateSpec(20, 3, renormalize=False, score=Score.SIGMOID, has_bias=True),
    "sigmoid, grouped": GateSpec(24, 5, renormalize=True, score=Score.SIGMOID, groups=GroupSpec(6, 3), scaling=2.0),
    "deepseek": deepseek(24, 5, 6, 3),
    "deepseek, every expert of its groups": deepseek(30, 9, 10, 3),
}


def inputs(spec: GateSpec, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    bias_E = torch.randn(spec.num_experts, generator=generator) if spec.has_bias else None
    return 2 * torch.randn(num_tokens, spec.num_experts, generator=generator), bias_E


@pytest.mark.parametrize(("router_class", "config_class", "renormalize", "options"), SOFTMAX)
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_same_experts_and_weights_as_transformers(router_class, config_class, renormalize, options, num_tokens):
    generator = torch.Generator().manual_seed(0)
    router = router_class(config_class(hidden_size=16, num_experts_per_tok=5, **options))
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        x_TD = torch.randn(num_tokens, 16, generator=generator)
        logits_TE, want_weights_TK, want_ids_TK = router(x_TD)
    ids_TK, weights_TK = route(logits_TE, None, GateSpec(24, 5, renormalize))
    assert torch.equal(ids_TK, want_ids_TK)
    torch.testing.assert_close(weights_TK, want_weights_TK, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("router_class", "config_class"), SIGMOID)
@pytest.mark.parametrize(("num_experts", "top_k", "num_groups", "group_top_k"), GROUPED)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("bias_std", [0.0, 0.1, 3.0])
def test_the_same_with_groups_and_correction_bias(
    router_class, config_class, num_experts, top_k, num_groups, group_top_k, renormalize, bias_std
):
    generator = torch.Generator().manual_seed(1)
    config = config_class(
        hidden_size=16,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        n_group=num_groups,
        topk_group=group_top_k,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    router = router_class(config)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(0.0, bias_std, generator=generator)
        logits_TE, want_weights_TK, want_ids_TK = router(torch.randn(200, 16, generator=generator))
    # Their order within a token is not promised.
    order_TK = want_ids_TK.argsort(1)
    spec = deepseek(num_experts, top_k, num_groups, group_top_k, renormalize)
    ids_TK, weights_TK = route(logits_TE, router.e_score_correction_bias, spec)
    assert torch.equal(ids_TK.sort(1).values, want_ids_TK.gather(1, order_TK))
    got_TK = weights_TK.gather(1, ids_TK.argsort(1))
    torch.testing.assert_close(got_TK, want_weights_TK.gather(1, order_TK), rtol=1e-6, atol=1e-9)


def ranked(values: list[float], candidates: list[int] | range, k: int) -> list[int]:
    return sorted(candidates, key=lambda i: (-values[i], i))[:k]


def by_definition(logits_E: list[float], bias_E: list[float], spec: GateSpec) -> list[int]:
    """The rule for ties in plain Python, for logits of 0 and -inf whose scores are exact."""
    if spec.score is Score.SIGMOID:
        scores = [0.5 if logit == 0 else 0.0 for logit in logits_E]
    else:
        scores = [float(logit == 0) / logits_E.count(0.0) for logit in logits_E]
    choice = [score + bias for score, bias in zip(scores, bias_E, strict=True)]
    if spec.groups is None:
        return ranked(choice, range(spec.num_experts), spec.top_k)
    size = spec.num_experts // spec.groups.num_groups
    members = [range(group * size, (group + 1) * size) for group in range(spec.groups.num_groups)]
    sums = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in members]
    kept = ranked(sums, range(spec.groups.num_groups), spec.groups.top_k)
    return ranked(choice, [e for group in kept for e in members[group]], spec.top_k)


@pytest.mark.parametrize("name", SPECS)
@given(data=st.data())
def test_among_equals_the_smaller_id_comes_first(name, data):
    spec = SPECS[name]
    choose = st.lists(st.sampled_from([0.0, -math.inf]), min_size=spec.num_experts, max_size=spec.num_experts)
    logits = data.draw(choose.filter(lambda values: 0.0 in values))
    bias = [0.0] * spec.num_experts
    if spec.has_bias:
        bias = data.draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25]), min_size=len(bias), max_size=len(bias)))
    ids_1K, _ = route(torch.tensor([logits]), torch.tensor(bias) if spec.has_bias else None, spec)
    assert ids_1K[0].tolist() == by_definition(logits, bias, spec)


def test_scores_that_differ_in_the_last_bit_are_not_equal():
    """Of either sign, and next to zero: the id must not outweigh a score."""
    values = torch.tensor([1.0, 0.5, 1e-3, 1e-30, -1e-30, -1e-3, -0.5, -1.0])
    pairs = torch.stack((torch.nextafter(values, torch.tensor(-9.0)), values), 1)
    bias_E = torch.zeros(512)
    bias_E[-16:] = pairs.flatten()
    bias_E[:-16] = -5.0
    spec = GateSpec(512, 16, renormalize=False, score=Score.SIGMOID, has_bias=True)
    ids_1K, _ = route(torch.full((1, 512), -math.inf), bias_E, spec)
    want = itertools.chain.from_iterable((497 + 2 * i, 496 + 2 * i) for i in range(8))
    assert ids_1K[0].tolist() == list(want)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_token_does_not_notice_the_others(name, num_threads):
    """In no bit: not their number, nor where it stands among them."""
    spec = SPECS[name]
    logits_TE, bias_E = inputs(spec, 700, seed=2)
    torch.set_num_threads(num_threads)
    try:
        ids_TK, weights_TK = route(logits_TE, bias_E, spec)
    finally:
        torch.set_num_threads(1)
    for start, stop in [(0, 1), (1, 2), (13, 16), (100, 133), (350, 351), (650, 700), (699, 700)]:
        ids_tK, weights_tK = route(logits_TE[start:stop].clone(), bias_E, spec)
        assert torch.equal(ids_tK, ids_TK[start:stop]), (start, stop)
        assert torch.equal(weights_tK, weights_TK[start:stop]), (start, stop)


@pytest.mark.parametrize("top_k", range(1, 17))
def test_nor_does_the_sum_of_its_weights(top_k):
    spec = GateSpec(40, top_k, renormalize=True)
    logits_TE, _ = inputs(spec, 65, seed=top_k)
    _, weights_TK = route(logits_TE, None, spec)
    alone_TK = torch.cat([route(row_E[None], None, spec)[1] for row_E in logits_TE])
    assert torch.equal(alone_TK, weights_TK)


@pytest.mark.parametrize("name", SPECS)
def test_no_tokens(name):
    spec = SPECS[name]
    ids_TK, weights_TK = route(*inputs(spec, 0, seed=0), spec)
    assert (ids_TK.shape, ids_TK.dtype) == ((0, spec.top_k), torch.int64)
    assert (weights_TK.shape, weights_TK.dtype) == ((0, spec.top_k), torch.float32)


def test_extreme_logits():
    logits_TE = torch.tensor(
        [[-1e30, 1e30, 0.0, 0.0], [float("-inf"), 0.0, 3.0, float("-inf")], [-0.0, 0.0, -0.0, 0.0]]
    )
    ids_TK, weights_TK = route(logits_TE, None, GateSpec(4, 3, renormalize=False))
    assert ids_TK.tolist() == [[1, 0, 2], [2, 1, 0], [0, 1, 2]]
    assert (weights_TK[:, :-1] >= weights_TK[:, 1:]).all()
    none_TE = torch.full((1, 4), -math.inf)
    _, zeros_TK = route(none_TE, None, GateSpec(4, 3, renormalize=True, score=Score.SIGMOID))
    assert zeros_TK.tolist() == [[0.0, 0.0, 0.0]]


NEGATIVE_NAN = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bad", [[math.nan], [NEGATIVE_NAN], [math.nan] * 7, "all nan", "all -inf", [math.inf]])
def test_nan_stays_in_its_row_and_shows_in_its_weights(name, bad):
    spec = SPECS[name]
    logits_TE, bias_E = inputs(spec, 5, seed=3)
    want_ids_TK, want_weights_TK = route(logits_TE, bias_E, spec)
    if bad == "all nan":
        logits_TE[2] = math.nan
    elif bad == "all -inf":
        logits_TE[2] = -math.inf
    else:
        logits_TE[2, spec.num_experts - len(bad) :] = torch.tensor(bad)
    ids_TK, weights_TK = route(logits_TE, bias_E, spec)
    others = [0, 1, 3, 4]
    assert torch.equal(ids_TK[others], want_ids_TK[others])
    assert torch.equal(weights_TK[others], want_weights_TK[others])
    assert len(set(ids_TK[2].tolist())) == spec.top_k
    assert ids_TK[2].min() >= 0
    assert ids_TK[2].max() < spec.num_experts
    # Infinities are as good as any logit to a sigmoid; a softmax divides infinity, or zero, by itself.
    scores_E = torch.sigmoid(logits_TE[2]) if spec.score is Score.SIGMOID else torch.softmax(logits_TE[2], 0)
    assert bool(weights_TK[2, 0].isnan()) == bool(scores_E.isnan().any())
    if spec.renormalize and scores_E.isnan().any():
        assert weights_TK[2].isnan().all()
