"""The dense and obvious oracle of an expert layer, for tests: no sorting, no batching, no ranks.

Legend: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]
"""[D] to [D]: what one expert makes of one token, in fp32."""


def moe_layer(x_TD: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor, experts: Sequence[Expert]) -> Tensor:
    """y[t] = Σ_k weights[t, k] · experts[topk_ids[t, k]](x[t]), one token and one expert at a time, in fp32."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    for t in range(topk_ids_TK.shape[0]):
        for k in range(topk_ids_TK.shape[1]):
            expert = experts[int(topk_ids_TK[t, k])]
            y_TD[t] += weights_TK[t, k].float() * expert(x_TD[t].float())
    return y_TD
