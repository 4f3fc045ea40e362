"""The residual sum and its norm."""

from __future__ import annotations

import pytest
import torch

from moestro.kernels.cuda.norm import add_rms_norm
from moestro.kernels.rms_norm import rms_norm_reference


def make(seed, num_rows, width, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    x_TM, delta_TM = torch.randn(2, num_rows, width, generator=generator).to(dtype)
    return x_TM, delta_TM, (1 + 0.1 * torch.randn(width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (1, 5), (3, 2048), (2, 2880), (1, 7168)])
def test_is_the_definition(num_rows, width, dtype):
    x_TM, delta_TM, weight_M = make(width, num_rows, width, dtype)
    want_sum = x_TM + delta_TM
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for delta in (delta_TM, None):
        given = x_TM.clone()
        got_sum, got = add_rms_norm(given, delta, weight_M, 1e-6)
        assert got_sum is given, "in place"
        assert torch.equal(got_sum, x_TM if delta is None else want_sum)
        want = rms_norm_reference(got_sum.double(), weight_M, 1e-6)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6)


def test_bits_do_not_depend_on_company():
    x_TM, delta_TM, weight_M = make(2, 5, 96)
    sums, crowd = add_rms_norm(x_TM.clone(), delta_TM, weight_M, 1e-6)
    for t in (0, 4):
        got_sum, got = add_rms_norm(x_TM[t : t + 1].clone(), delta_TM[t : t + 1], weight_M, 1e-6)
        assert torch.equal(got[0], crowd[t])
        assert torch.equal(got_sum[0], sums[t])
    order = [3, 1, 4, 0, 2]
    assert torch.equal(add_rms_norm(x_TM[order], delta_TM[order], weight_M, 1e-6)[1], crowd[order])
