"""The greedy choice without a wait: a token id or what is wrong with the row, for a step that is captured.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.protos.sequences import SampledToken
from moestro.workers.sampling.sampler import NOTHING_DRAWN, error_of

NAN, PLUS_INF, ALL_MINUS_INF = -1, -2, -3


def greedy_codes(logits_RV: Tensor) -> Tensor:
    """code_R (int64): of each row the smallest id of its largest logit, or a negative code for a row that contains NaN
    or +Inf, or nothing finite. Never waits for the device."""
    id_R = logits_RV.argmax(dim=1)
    best_R = logits_RV.gather(1, id_R[:, None])[:, 0]
    infinite_R = torch.where(best_R > 0, PLUS_INF, ALL_MINUS_INF)
    return torch.where(best_R.isfinite(), id_R, torch.where(best_R.isnan(), NAN, infinite_R))


def token_of(code: int) -> SampledToken:
    """What the sampler says of such a code."""
    return SampledToken(code) if code >= 0 else SampledToken(NOTHING_DRAWN, error=error_of(code))
