from __future__ import annotations

from functools import partial

import pytest
import torch

from moestro.kernels.grouped_experts import (
    ExpertShape,
    LoopedExperts,
    StackedExperts,
    experts_reference,
    make_experts,
)

WIDTH, MODEL_WIDTH = 32, 48


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 3, 0, 40], [5, 1, 2, 8]])
def test_definition(device, dtype, counts):
    generator = torch.Generator().manual_seed(sum(counts))
    gate_up_L2ID = (torch.randn(4, 2 * WIDTH, MODEL_WIDTH, generator=generator) * 0.2).to(device, dtype)
    down_LDI = (torch.randn(4, MODEL_WIDTH, WIDTH, generator=generator) * 0.2).to(device, dtype)
    x_RD = torch.randn(sum(counts), MODEL_WIDTH, generator=generator).to(device, dtype)
    counts_L = torch.tensor(counts, device=device)

    def fill(e, gate_up_2ID, down_DI):
        gate_up_2ID.copy_(gate_up_L2ID[e])
        down_DI.copy_(down_LDI[e])

    fills = [partial(fill, e) if counts[e] else None for e in range(4)]
    experts = make_experts(ExpertShape(WIDTH, MODEL_WIDTH, dtype, device), fills)
    stacked = device.type == "cuda" and dtype == torch.bfloat16
    assert isinstance(experts, StackedExperts if stacked else LoopedExperts)
    got, want = experts.apply(x_RD, counts_L), experts_reference(x_RD, counts_L, gate_up_L2ID, down_LDI)
    # Products, silu and their product are rounded before the second product: each error is relative to the terms of a
    # sum, not to the sum.
    unit = 2**-22 if dtype == torch.float32 else 2**-8
    scale = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=4 * unit * scale)


def test_a_rank_without_experts_gets_no_rows(device, dtype):
    experts = make_experts(ExpertShape(WIDTH, MODEL_WIDTH, dtype, device), [])
    x_RD = torch.empty(0, MODEL_WIDTH, dtype=dtype, device=device)
    assert experts.apply(x_RD, torch.zeros(0, dtype=torch.int64, device=device)).shape == (0, MODEL_WIDTH)


def test_an_expert_is_replaced_and_padding_stays_apart(device, dtype):
    generator = torch.Generator().manual_seed(5)
    gate_up_L2ID = (torch.randn(3, 2 * WIDTH, MODEL_WIDTH, generator=generator) * 0.2).to(device, dtype)
    down_LDI = (torch.randn(3, MODEL_WIDTH, WIDTH, generator=generator) * 0.2).to(device, dtype)

    def fill(e, gate_up_2ID, down_DI):
        gate_up_2ID.copy_(gate_up_L2ID[e])
        down_DI.copy_(down_LDI[e])

    shape = ExpertShape(WIDTH, MODEL_WIDTH, dtype, device)
    experts = make_experts(shape, [partial(fill, 0), None])
    staged = [experts.stage(partial(fill, e)) for e in (2, 1)]
    experts.replace_(0, staged[0])
    experts.replace_(1, staged[1])
    fresh = make_experts(shape, [partial(fill, 2), partial(fill, 1)])
    x_RD = torch.randn(9, MODEL_WIDTH, generator=generator).to(device, dtype)
    counts_L = torch.tensor([4, 2], device=device)
    got_RD = experts.apply(x_RD, counts_L)
    assert got_RD.shape == x_RD.shape
    assert torch.equal(got_RD[:6], fresh.apply(x_RD[:6], counts_L))


def test_slots_come_and_go(device, dtype):
    generator = torch.Generator().manual_seed(5)
    gate_up_L2ID = (torch.randn(3, 2 * WIDTH, MODEL_WIDTH, generator=generator) * 0.2).to(device, dtype)
    down_LDI = (torch.randn(3, MODEL_WIDTH, WIDTH, generator=generator) * 0.2).to(device, dtype)

    def fill(e, gate_up_2ID, down_DI):
        gate_up_2ID.copy_(gate_up_L2ID[e])
        down_DI.copy_(down_LDI[e])

    shape = ExpertShape(WIDTH, MODEL_WIDTH, dtype, device)
    whole = make_experts(shape, [partial(fill, e) for e in range(3)])
    x_RD = torch.randn(9, MODEL_WIDTH, generator=generator).to(device, dtype)
    wanted_RD = whole.apply(x_RD, torch.tensor([3, 3, 3], device=device))
    fewer = whole.with_slots([2, 0])
    counts_L = torch.tensor([3, 3], device=device)
    assert torch.equal(fewer.apply(x_RD[[6, 7, 8, 0, 1, 2]], counts_L), wanted_RD[[6, 7, 8, 0, 1, 2]])
    again = fewer.with_slots([1, None, 0])
    again.replace_(1, again.stage(partial(fill, 1)))
    assert torch.equal(again.apply(x_RD, torch.tensor([3, 3, 3], device=device)), wanted_RD)


def make(device, dtype, width=40, model_width=24):
    generator = torch.Generator().manual_seed(5)

    def fill(gate_up_2ID, down_DI):
        gate_up_2ID.copy_(torch.randn(gate_up_2ID.shape, generator=generator))
        down_DI.copy_(torch.randn(down_DI.shape, generator=generator))

    experts = make_experts(ExpertShape(width, model_width, dtype, device), [fill] * 4)
    return experts, torch.randn(200, model_width, generator=generator)


def test_rows_beyond_the_counts_are_padding(device, dtype):
    experts, x_RD = make(device, dtype)
    x_RD = x_RD.to(device, dtype)
    counts_L = torch.tensor([3, 0, 7, 1], device=device)
    want = experts.apply(x_RD[:11], counts_L)
    x_RD[11:] = float("nan")
    got = experts.apply(x_RD[:30], counts_L)
    assert got.shape == (30, 24)
    assert torch.equal(got[:11], want)
    assert experts.apply(x_RD[:30], torch.zeros_like(counts_L)).shape == (30, 24)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(device, dtype, threads):
    torch.set_num_threads(threads)
    experts, x_RD = make(device, dtype)
    x_RD = x_RD.to(device, dtype)
    counts = [0, 150, 1, 49]
    whole = experts.apply(x_RD, torch.tensor(counts, device=device))
    torch.set_num_threads(1)
    for row, expert in ((0, 1), (77, 1), (149, 1), (150, 2), (170, 3)):
        counts_L = torch.tensor([int(e == expert) for e in range(4)], device=device)
        assert torch.equal(experts.apply(x_RD[row : row + 1], counts_L), whole[row : row + 1]), row
