"""The dense linear against fp64, and its bits for any number of rows, any tile, parts in parallel or in turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.cuda.linear import CudaLinear
from moestro.kernels.cuda.tiles import MAX_PARALLEL_ROWS, Tile, part_width


def make(out_features, in_features, seed=0, *, bias=False, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    bias_O = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    return CudaLinear(weight_OI.to(dtype), bias_O), generator


def check(linear, x_TI):
    want_TO = x_TI.double() @ linear.weight_OI.double().T
    if linear.bias_O is not None:
        want_TO += linear.bias_O.double()
    got_TO = linear.apply(x_TI)
    assert got_TO.dtype == x_TI.dtype
    # A sum of terms near 1 in fp32, and its rounding.
    rounding = 2**-8 if x_TI.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got_TO.double(), want_TO, rtol=rounding, atol=2e-6)
    assert not linear.arrived_B.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 16), (65, 40), (16, 1100)])
@pytest.mark.parametrize("num_rows", [0, 1, 66])
def test_definition(out_features, in_features, num_rows, dtype):
    linear, generator = make(out_features, in_features, bias=out_features % 2 == 1, dtype=dtype)
    check(linear, torch.randn(num_rows, in_features, generator=generator).to(dtype))


@given(
    out_features=st.integers(1, 140),
    in_features=st.integers(1, 300),
    num_rows=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_random_shapes(out_features, in_features, num_rows, bias, seed):
    linear, generator = make(out_features, in_features, seed, bias=bias)
    check(linear, torch.randn(num_rows, in_features, generator=generator).bfloat16())


@pytest.mark.parametrize(
    ("in_features", "dtype"), [(200, torch.bfloat16), (2048, torch.bfloat16), (1030, torch.float32)]
)
def test_a_row_does_not_notice_the_others(in_features, dtype):
    linear, generator = make(60, in_features, dtype=dtype)
    assert (part_width(60, in_features) < in_features) == (in_features > 200)  # sums in parts
    x_TI = torch.randn(MAX_PARALLEL_ROWS + 6, in_features, generator=generator).to(dtype)
    want_TO = linear.apply(x_TI)
    for start, stop in [(0, 1), (69, 70), (5, 22), (0, 65)]:
        assert torch.equal(linear.apply(x_TI[start:stop]), want_TO[start:stop]), (start, stop)
    order_T = torch.randperm(len(x_TI), generator=generator)
    assert torch.equal(linear.apply(x_TI[order_T]), want_TO[order_T])


@pytest.mark.parametrize("num_rows", [20, MAX_PARALLEL_ROWS + 1])
def test_nor_the_tiles(num_rows):
    linear, generator = make(150, 1100)
    x_TI = torch.randn(num_rows, 1100, generator=generator).bfloat16()
    want_TO = linear.apply(x_TI)
    for tile in [Tile(64, 16, 256, 4, 2), Tile(128, 32, 128, 4, 3), Tile(128, 128, 64, 8, 3)]:
        assert torch.equal(linear.apply_tiled(x_TI, tile), want_TO), tile


def test_nan_stays_in_its_row():
    linear, generator = make(20, 1100)
    x_TI = torch.randn(9, 1100, generator=generator).bfloat16()
    want_TO = linear.apply(x_TI)
    x_TI[4, 7] = torch.nan
    got_TO = linear.apply(x_TI)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got_TO[others], want_TO[others])
    assert got_TO[4].isnan().all()
