from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.linear import PackedLinear, PlainLinear, can_pack, make_linear


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 33, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_is_the_product(device, dtype, rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x_TI = torch.randn(rows, 48, generator=generator).to(device, dtype)
    weight_OI = torch.randn(40, 48, generator=generator).to(device, dtype)
    bias_O = torch.randn(40, generator=generator).to(device, dtype) if bias else None
    want = x_TI.double() @ weight_OI.double().T + (bias_O.double() if bias_O is not None else 0)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8  # one rounding of the result
    for linear in (make_linear(weight_OI, bias_O), PlainLinear(weight_OI, bias_O)):
        got = linear.apply(x_TI)
        assert (got.dtype, got.shape, linear.out_features) == (dtype, (rows, 40), 40)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * 8)


def test_weights_are_packed_where_that_is_faster():
    packs = can_pack(torch.device("cpu"), torch.bfloat16)
    assert isinstance(make_linear(torch.zeros(4, 4, dtype=torch.bfloat16)), PackedLinear) == packs
    assert isinstance(make_linear(torch.zeros(4, 4)), PackedLinear)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(40, 24), (1, 256), (101, 64), (256, 512), (64, 80)])
@pytest.mark.parametrize("kind", [make_linear, PlainLinear])
def test_a_row_does_not_depend_on_the_rows_beside_it(device, dtype, threads, shape, kind):
    generator = torch.Generator().manual_seed(shape[0])
    weight_OI = torch.randn(shape, generator=generator).to(device, dtype)
    storage = torch.randn(301 * shape[1] + 1, generator=generator).to(device, dtype)
    x_TI = storage[1:].view(301, -1)  # not aligned
    linear = kind(weight_OI)
    whole = linear.apply(x_TI)
    for rows in (1, 2, 3, 5, 7, 9, 11, 15, 16, 17, 31, 33, 63, 100, 257):
        for start in (0, 1, 44):
            assert torch.equal(linear.apply(x_TI[start : start + rows]), whole[start : start + rows]), (rows, start)
            assert torch.equal(linear.apply(x_TI[start : start + rows].clone()), whole[start : start + rows])
    torch.set_num_threads(1)
    assert torch.equal(kind(weight_OI).apply(x_TI[:5]), whole[:5]), "another number of threads"


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    rows=st.integers(1, 40),
    start=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_of_any_shape(shape, rows, start, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = make_linear(torch.randn(shape, generator=generator).to(dtype))
    x_TI = torch.randn(60, shape[1], generator=generator).to(dtype)
    assert torch.equal(linear.apply(x_TI[start : start + rows]), linear.apply(x_TI)[start : start + rows]), seed
