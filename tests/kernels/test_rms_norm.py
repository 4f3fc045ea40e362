from __future__ import annotations

import pytest
import torch

from moestro.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (5, 3, 24)])
@pytest.mark.parametrize("weighted", [False, True])
def test_definition(device, dtype, shape, weighted):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=generator) * 3).to(device, dtype)
    weight = torch.rand(shape[-1], generator=generator).to(device, dtype) if weighted else None
    got, want = rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_epsilon_keeps_zeros_finite(device, dtype):
    x = torch.zeros(2, 8, dtype=dtype, device=device)
    assert torch.equal(rms_norm(x, None, 1e-6), x)
