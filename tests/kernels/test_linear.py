from __future__ import annotations

import pytest
import torch

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


def test_a_row_of_a_packed_product_does_not_depend_on_the_rows_beside_it():
    if not can_pack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this CPU does not multiply bf16")
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(16, 512, generator=generator).bfloat16()
    linear = make_linear(torch.randn(256, 512, generator=generator).bfloat16())
    alone = linear.apply(x_TI[:1])
    for rows in (2, 3, 8, 16):
        assert torch.equal(linear.apply(x_TI[:rows])[:1], alone), rows
