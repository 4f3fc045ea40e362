from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cpu import needs_cpu_kernels

from moestro.kernels.cpu.linear import make_cpu_linear

pytestmark = needs_cpu_kernels

SHAPES = [(1, 1), (1, 33), (15, 8), (17, 7), (63, 40), (64, 64), (65, 31), (130, 129), (200, 64)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 13, 33, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_definition(threads, shape, rows, bias):
    weight_OI, x_TI = random(*shape, seed=1), random(rows, shape[1], seed=2)
    bias_O = random(shape[0], seed=3) if bias else None
    linear = make_cpu_linear(weight_OI, bias_O)
    want = x_TI.double() @ weight_OI.double().T + (bias_O.double() if bias_O is not None else 0)
    wide, got = linear.apply_fp32(x_TI), linear.apply(x_TI)
    assert (got.shape, got.dtype, wide.dtype) == ((rows, shape[0]), torch.bfloat16, torch.float32)
    torch.testing.assert_close(wide.double(), want, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)
    assert torch.equal(got, wide.bfloat16()), "rounded once, to nearest"


@pytest.mark.parametrize("shape", [(65, 31), (192, 64), (40, 512)])
def test_a_row_does_not_depend_on_the_rows_beside_it(shape):
    x_TI = random(130, shape[1], seed=5)
    linear = make_cpu_linear(random(*shape, seed=4))
    alone = torch.cat([linear.apply_fp32(x_TI[row : row + 1]) for row in range(len(x_TI))])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, len(x_TI) + 1):
            assert torch.equal(linear.apply_fp32(x_TI[:rows]), alone[:rows]), (rows, threads)
        order = torch.randperm(len(x_TI), generator=torch.Generator().manual_seed(6))
        assert torch.equal(linear.apply_fp32(x_TI[order]), alone[order])
    torch.set_num_threads(1)


def test_a_column_does_not_depend_on_the_columns_beside_it():
    weight_OI, x_TI = random(100, 70, seed=7), random(9, 70, seed=8)
    whole = make_cpu_linear(weight_OI).apply_fp32(x_TI)
    for begin, end in ((0, 1), (3, 20), (60, 70), (17, 100)):
        assert torch.equal(make_cpu_linear(weight_OI[begin:end]).apply_fp32(x_TI), whole[:, begin:end])


def test_rows_may_lie_apart():
    wide_TI, weight_OI = random(7, 100, seed=9), random(40, 31, seed=10)
    linear = make_cpu_linear(weight_OI)
    assert torch.equal(linear.apply(wide_TI[:, 5:36]), linear.apply(wide_TI[:, 5:36].clone()))
    assert torch.equal(linear.apply(wide_TI[::3, 5:36]), linear.apply(wide_TI[:, 5:36])[::3])


def test_nan_and_infinity_stay_in_their_row():
    x_TI, linear = random(13, 33, seed=11), make_cpu_linear(random(50, 33, seed=12))
    want = linear.apply(x_TI)
    x_TI[4], x_TI[9, 32] = float("nan"), float("inf")
    got = linear.apply(x_TI)
    others = [row for row in range(13) if row not in (4, 9)]
    assert torch.equal(got[others], want[others])
    assert got[4].isnan().all()
    assert not got[9].isfinite().any()


def test_what_does_not_fit_is_refused():
    linear = make_cpu_linear(random(8, 6))
    with pytest.raises(ValueError, match="7 features"):
        linear.apply(random(2, 7))
    with pytest.raises(TypeError, match="BFloat16"):
        linear.apply(torch.zeros(2, 6))


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 200),
    inputs=st.integers(1, 150),
    rows=st.integers(1, 60),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_shape(columns, inputs, rows, threads, seed):
    weight_OI, x_TI = random(columns, inputs, seed=seed), random(rows, inputs, seed=seed + 1)
    linear = make_cpu_linear(weight_OI)
    torch.set_num_threads(threads)
    got = linear.apply_fp32(x_TI)
    torch.set_num_threads(1)
    torch.testing.assert_close(got.double(), x_TI.double() @ weight_OI.double().T, rtol=1e-5, atol=2e-5 * inputs**0.5)
    row = seed % rows
    assert torch.equal(linear.apply_fp32(x_TI[row : row + 1]), got[row : row + 1])
