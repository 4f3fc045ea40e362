"""The sum of a token's expert rows: its definition, and the same bits however many rows are weighed at once."""

from __future__ import annotations

import pytest
import torch

from moestro.kernels import weighted_sum as weighing
from moestro.kernels.weighted_sum import weighted_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "k", "width"), [(0, 2, 8), (1, 1, 8), (1, 8, 512), (33, 5, 70), (300, 4, 128)])
def test_both_ways_are_the_definition(monkeypatch, dtype, num_tokens, k, width):
    generator = torch.Generator().manual_seed(num_tokens + k)
    y_TKD = torch.randn(num_tokens, k, width, generator=generator).to(dtype)
    weights_TK = torch.rand(num_tokens, k, generator=generator)
    want_TD = torch.zeros(num_tokens, width)
    for index in range(k):
        want_TD = want_TD + y_TKD[:, index].float() * weights_TK[:, index, None]
    for elements in (0, 1 << 30):
        monkeypatch.setattr(weighing, "_WEIGHED_AT_ONCE", {"cpu": elements})
        got_TD = weighted_sum(y_TKD, weights_TK)
        assert got_TD.dtype == dtype
        assert torch.equal(got_TD, want_TD.to(dtype))
