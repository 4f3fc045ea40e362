"""Experts against the definition in fp64, and their bits however the rows come."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.cuda.expert_weights import CLAMPED_SWIGLU, SILU, dequantize, quantize
from moestro.kernels.cuda.experts import make_cuda_experts
from moestro.kernels.cuda.tiles import Tile
from moestro.kernels.grouped_experts import ExpertShape, mix_sorted

CPU = torch.device("cpu")


def make(width, model_width, num_slots, seed=0, *, fp8=False, bias=False, activation=SILU):
    generator = torch.Generator().manual_seed(seed)

    def fill(gate_up_2ID, down_DI):
        gate_up_2ID.copy_(torch.randn(gate_up_2ID.shape, generator=generator) / model_width**0.5)
        down_DI.copy_(torch.randn(down_DI.shape, generator=generator) / width**0.5)

    shape = ExpertShape(width, model_width, torch.bfloat16, CPU)
    experts = make_cuda_experts(shape, [fill] * num_slots, fp8=fp8, bias=bias, activation=activation)
    if bias:
        experts.gate_up.bias_O.copy_(torch.randn(experts.gate_up.bias_O.shape, generator=generator))
        experts.down.bias_O.copy_(torch.randn(experts.down.bias_O.shape, generator=generator))
    return experts


def rounded_rows(x_RH, fp8):
    """What the products see of activations."""
    if not fp8:
        return x_RH.double()
    blocks = [quantize(x_RH[r : r + 1]) for r in range(len(x_RH))]
    return torch.cat([dequantize(*block) for block in blocks])


def weight(weights, slot):
    one = weights[slot]
    stored = one.weight_OH.double() if one.scale_oh is None else dequantize(one.weight_OH, one.scale_oh)
    return stored, 0 if one.bias_O is None else one.bias_O.double()


def reference(experts, x_RD, slot_R):
    """One row at a time, in fp64; hidden rows are rounded to bf16 once."""
    fp8, act, rows = experts.down.scale_oh is not None, experts.activation, []
    for x_D, slot in zip(rounded_rows(x_RD, fp8), slot_R.tolist(), strict=True):
        (gate_up, gate_up_bias), (down, down_bias) = weight(experts.gate_up, slot), weight(experts.down, slot)
        gate_I, up_I = (gate_up @ x_D + gate_up_bias).chunk(2)
        if act.limit:
            gate_I, up_I = gate_I.clamp(max=act.limit), up_I.clamp(-act.limit, act.limit)
        hidden_I = gate_I * torch.sigmoid(act.alpha * gate_I) * (up_I + act.up_shift)
        rows.append(down @ rounded_rows(hidden_I.bfloat16()[None], fp8)[0] + down_bias)
    return torch.stack(rows)


def assert_near(got, want, fp8=False):
    # A hidden number near the middle of two e4m3 numbers may go either way.
    error = float((got.double() - want).norm() / want.norm())
    assert error < (2e-2 if fp8 else 4e-3), error


def spread(num_tokens, num_slots, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    slots_TK = torch.rand(num_tokens, num_slots, generator=generator).topk(top_k).indices
    weights_TK = torch.rand(num_tokens, top_k, generator=generator)
    return slots_TK, weights_TK, generator


FORMATS = {
    "bf16": {},
    "biases": {"bias": True, "activation": CLAMPED_SWIGLU},
    "fp8": {"fp8": True},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("width", "model_width"), [(8, 264), (136, 24)])
@pytest.mark.parametrize("counts", [[1, 0, 0, 0], [0, 3, 0, 20]])
def test_definition(name, width, model_width, counts):
    experts = make(width, model_width, 4, **FORMATS[name])
    slot_R = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    x_RD = torch.randn(len(slot_R) + 3, model_width, generator=torch.Generator().manual_seed(1)).bfloat16()
    x_RD[len(slot_R) :] = torch.nan  # padding
    got_RD = experts.apply(x_RD, torch.tensor(counts))
    assert got_RD.shape == x_RD.shape
    assert_near(got_RD[: len(slot_R)], reference(experts, x_RD[: len(slot_R)], slot_R), "fp8" in name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 4), (33, 4)])
def test_every_way_to_mix_gives_the_bits_of_its_definition(name, num_tokens, top_k):
    experts = make(24, 56, 6, **FORMATS[name])
    slots_TK, weights_TK, generator = spread(num_tokens, 6, top_k, seed=2)
    x_TD = torch.randn(num_tokens, 56, generator=generator).bfloat16()
    want_TD, want_L = mix_sorted(experts, 6, x_TD, slots_TK, weights_TK)
    tiles = experts.tiles(num_tokens * top_k)
    for mix in (experts.mix, partial(experts.mix_sorted, tiles=tiles), partial(experts.mix_compared, tiles=tiles)):
        got_TD, got_L = mix(x_TD, slots_TK, weights_TK)
        assert torch.equal(got_TD, want_TD)
        assert (got_L.dtype, got_L.tolist()) == (torch.int64, want_L.tolist())


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_a_token_does_not_notice_the_others_nor_the_tiles(name):
    experts = make(24, 200, 3, **FORMATS[name])
    slots_TK, weights_TK, generator = spread(24, 3, 2, seed=3)
    x_TD = torch.randn(24, 200, generator=generator).bfloat16()
    want_TD, _ = experts.mix(x_TD, slots_TK, weights_TK)
    for start, stop in [(0, 1), (3, 19), (23, 24)]:
        got_TD, _ = experts.mix(x_TD[start:stop], slots_TK[start:stop], weights_TK[start:stop])
        assert torch.equal(got_TD, want_TD[start:stop]), (start, stop)
    order_T = torch.randperm(24, generator=generator)
    assert torch.equal(experts.mix(x_TD[order_T], slots_TK[order_T], weights_TK[order_T])[0], want_TD[order_T])
    features = 128 if name == "fp8" else 64
    for tile in [Tile(64, 16, features, 4, 3), Tile(128, 32, features, 8, 3)]:
        assert torch.equal(experts.mix_sorted(x_TD, slots_TK, weights_TK, (tile, tile))[0], want_TD), tile
        assert torch.equal(experts.mix_compared(x_TD, slots_TK, weights_TK, (tile, tile))[0], want_TD), tile


@given(
    num_tokens=st.integers(1, 20),
    num_slots=st.integers(1, 9),
    width=st.integers(1, 40),
    model_width=st.integers(1, 80),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_random_shapes(num_tokens, num_slots, width, model_width, seed):
    experts = make(width, model_width, num_slots, seed)
    top_k = min(num_slots, 3)
    slots_TK, weights_TK, generator = spread(num_tokens, num_slots, top_k, seed)
    x_TD = torch.randn(num_tokens, model_width, generator=generator).bfloat16()
    got_TD, _ = experts.mix(x_TD, slots_TK, weights_TK)
    y_PD = reference(experts, x_TD.repeat_interleave(top_k, 0), slots_TK.flatten())
    want_TD = (y_PD.view(num_tokens, top_k, -1) * weights_TK[..., None]).sum(1)
    largest = float(y_PD.abs().max())
    torch.testing.assert_close(got_TD.double(), want_TD, rtol=0, atol=2**-6 * largest)


def test_nan_stays_with_its_token():
    experts = make(16, 24, 4)
    slots_TK, weights_TK, generator = spread(20, 4, 2, seed=5)
    x_TD = torch.randn(20, 24, generator=generator).bfloat16()
    want_TD, _ = experts.mix(x_TD, slots_TK, weights_TK)
    x_TD[3], weights_TK[11, 1] = torch.nan, torch.nan
    got_TD, _ = experts.mix(x_TD, slots_TK, weights_TK)
    sane = [t for t in range(20) if t not in (3, 11)]
    assert torch.equal(got_TD[sane], want_TD[sane])
    assert got_TD[[3, 11]].isnan().all()


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_to_do(name):
    experts = make(16, 24, 3, **FORMATS[name])
    none_TD = torch.empty(0, 24, dtype=torch.bfloat16)
    out_TD, counts_L = experts.mix(none_TD, torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert (out_TD.shape, counts_L.tolist()) == ((0, 24), [0, 0, 0])
    assert experts.apply(none_TD, counts_L).shape == (0, 24)
    assert experts.apply(torch.ones(5, 24, dtype=torch.bfloat16), counts_L).shape == (5, 24)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_an_expert_is_replaced(name):
    experts, others = make(16, 24, 3, seed=6, **FORMATS[name]), make(16, 24, 3, seed=7, **FORMATS[name])
    counts_L = torch.tensor([2, 3, 1])
    x_RD = torch.randn(6, 24, generator=torch.Generator().manual_seed(8)).bfloat16()
    before_RD, want_RD = experts.apply(x_RD, counts_L), others.apply(x_RD, counts_L)

    def fill(gate_up_2ID, down_DI):
        generator = torch.Generator().manual_seed(7)
        for _ in range(2):  # the second of the three that make() fills
            gate_up_2ID.copy_(torch.randn(gate_up_2ID.shape, generator=generator) / 24**0.5)
            down_DI.copy_(torch.randn(down_DI.shape, generator=generator) / 16**0.5)

    experts.replace_(1, experts.stage(fill))
    after_RD = experts.apply(x_RD, counts_L)
    assert torch.equal(after_RD[2:5], want_RD[2:5])
    assert torch.equal(after_RD[[0, 1, 5]], before_RD[[0, 1, 5]])


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_slots_come_and_go(name):
    experts = make(16, 24, 3, seed=6, **FORMATS[name])
    x_RD = torch.randn(6, 24, generator=torch.Generator().manual_seed(8)).bfloat16()
    want_RD = experts.apply(x_RD, torch.tensor([2, 2, 2]))
    again = experts.with_slots([2, None, 0, 1]).with_slots([2, 3, 0])
    assert again.num_slots == 3
    assert torch.equal(again.apply(x_RD, torch.tensor([2, 2, 2])), want_RD)
