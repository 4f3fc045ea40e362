"""Which experts a token needs, and with what weights.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ID_BITS = 16  # room for the expert id below the 32 bits of a probability


def softmax_topk(logits_TE: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The K most likely experts of each token, most likely first: ids_TK (int64) and weights_TK (fp32).

    The softmax is over all experts and in fp32; ``renormalize`` divides the K weights by their sum. Among equal
    probabilities the smaller id comes first: ``topk`` alone promises no order, and two ranks must not disagree.
    """
    probs_TE = torch.softmax(logits_TE, -1, dtype=torch.float32)
    # The bits of a non-negative float sort like the float; with the id below them no two keys are equal.
    ids_E = torch.arange(probs_TE.shape[-1], device=probs_TE.device)
    keys_TE = (probs_TE.view(torch.int32).to(torch.int64) << _ID_BITS) - ids_E
    # An idle rank asks for no rows, for which not every device's selection promises a result.
    ids_TK = keys_TE.topk(k, -1).indices if keys_TE.shape[0] else keys_TE.new_empty(0, k)
    weights_TK = probs_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK, weights_TK
