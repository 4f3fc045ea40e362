"""The gate's kernel against the plain gate, under the same rules."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.test_gate import SPECS, by_definition, deepseek, inputs

from moestro.kernels.cuda.gate import route
from moestro.kernels.gate import GateSpec
from moestro.kernels.gate import route as plain_route

ALL = {**SPECS, "DeepSeek-V3": deepseek(256, 8, 8, 4), "512 experts": GateSpec(512, 10, renormalize=True)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_choice_and_weights(name, dtype):
    spec = ALL[name]
    logits_TE, bias_E = inputs(spec, 9, seed=1)
    logits_TE = logits_TE.to(dtype)
    counts_E = torch.ones(spec.num_experts, dtype=torch.int64)
    ids_TK, weights_TK = route(logits_TE, bias_E, spec, counts_E)
    want_ids_TK, want_weights_TK = plain_route(logits_TE, bias_E, spec)
    assert torch.equal(ids_TK, want_ids_TK)
    torch.testing.assert_close(weights_TK, want_weights_TK, rtol=1e-6, atol=1e-8)
    assert torch.equal(counts_E - 1, want_ids_TK.flatten().bincount(minlength=spec.num_experts))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_among_equals_the_smaller_id_comes_first(name, seed):
    spec, generator = SPECS[name], torch.Generator().manual_seed(seed)
    logits_E = torch.rand(spec.num_experts, generator=generator).sub(0.5).sign().clamp(max=0) * math.inf
    logits_E[logits_E.isnan()] = 0.0  # and the others -inf
    bias_E = torch.tensor([-1.0, -0.5, 0.0, 0.25])[torch.randint(4, (spec.num_experts,), generator=generator)]
    bias_E = bias_E if spec.has_bias else torch.zeros(spec.num_experts)
    ids_1K, _ = route(logits_E[None], bias_E if spec.has_bias else None, spec)
    assert ids_1K[0].tolist() == by_definition(logits_E.tolist(), bias_E.tolist(), spec)


@pytest.mark.parametrize("name", SPECS)
def test_a_token_does_not_notice_the_others(name):
    spec = SPECS[name]
    logits_TE, bias_E = inputs(spec, 5, seed=2)
    ids_TK, weights_TK = route(logits_TE, bias_E, spec)
    for t in range(5):
        ids_1K, weights_1K = route(logits_TE[t : t + 1], bias_E, spec)
        assert torch.equal(ids_1K[0], ids_TK[t])
        assert torch.equal(weights_1K[0], weights_TK[t])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bad", [[math.nan], [math.nan] * 7, "all nan", "all -inf", [math.inf]])
def test_nan_stays_in_its_row_and_shows_in_its_weights(name, bad):
    spec = SPECS[name]
    logits_TE, bias_E = inputs(spec, 3, seed=3)
    want_ids_TK, want_weights_TK = route(logits_TE, bias_E, spec)
    if isinstance(bad, str):
        logits_TE[1] = math.nan if bad == "all nan" else -math.inf
    else:
        logits_TE[1, spec.num_experts - len(bad) :] = torch.tensor(bad)
    ids_TK, weights_TK = route(logits_TE, bias_E, spec)
    assert torch.equal(ids_TK[[0, 2]], want_ids_TK[[0, 2]])
    assert torch.equal(weights_TK[[0, 2]], want_weights_TK[[0, 2]])
    assert sorted(set(ids_TK[1].tolist())) == sorted(ids_TK[1].tolist())
    assert ids_TK[1].min() >= 0
    assert ids_TK[1].max() < spec.num_experts
    _, plain_TK = plain_route(logits_TE, bias_E, spec)
    assert bool(weights_TK[1, 0].isnan()) == bool(plain_TK[1, 0].isnan())
    if spec.renormalize:
        assert torch.equal(weights_TK[1].isnan(), plain_TK[1].isnan())


@pytest.mark.parametrize("name", SPECS)
def test_no_tokens(name):
    ids_TK, weights_TK = route(*inputs(SPECS[name], 0, seed=0), SPECS[name])
    assert (ids_TK.shape, ids_TK.dtype) == ((0, SPECS[name].top_k), torch.int64)
    assert (weights_TK.shape, weights_TK.dtype) == ((0, SPECS[name].top_k), torch.float32)
