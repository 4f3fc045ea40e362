"""LocalTransport against the dense reference."""

import pytest
import torch
from tests.router.cases import CASES, Case, expert_layer, expert_weights, make_tokens, reference

from moestro.router.transport import LocalTransport


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_local_transport_equals_the_reference(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    weights = expert_weights(case.num_experts, dtype)
    transport, here = LocalTransport(case.num_experts), tuple(range(case.num_experts))
    for rank, num_tokens in enumerate(case.tokens_per_rank(4)):
        x_TD, ids_TK, w_TK = make_tokens(case, rank, num_tokens, dtype)
        y_TD = expert_layer(transport, here, (num_tokens,), x_TD, ids_TK, w_TK, weights)
        expected_TD = reference(x_TD, ids_TK, w_TK, weights)
        torch.testing.assert_close(y_TD.float(), expected_TD, rtol=tolerance, atol=tolerance)
