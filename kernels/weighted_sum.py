"""Each token's expert rows become one: the last step of a mixture.

Legend: T tokens, K experts per token, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_WEIGHED_AT_ONCE = {"cpu": 1 << 16}
"""Elements up to which all rows are weighed in one operation: on a CPU while they fit its cache; an accelerator is
better off with few and large operations. The bits are the same."""


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over K in order, in fp32. A loop and not a reduction: the order is part of the contract."""
    terms: Iterator[Tensor]
    if y_TKD.numel() <= _WEIGHED_AT_ONCE.get(y_TKD.device.type, 1 << 28):
        terms = iter((y_TKD.float() * weights_TK.float().unsqueeze(-1)).unbind(1))
    else:
        terms = (y_TKD[:, k].float() * weights_TK[:, k, None].float() for k in range(y_TKD.shape[1]))
    out_TD = next(terms)
    for term_TD in terms:
        out_TD = out_TD + term_TD
    return out_TD.to(y_TKD.dtype)
