"""The filters top_k, min_p and top_p, on tempered logits.

Legend: G = rows, W = tokens of a row in the order of ``ordering.ranked`` (larger first, smaller id among equals).

Logits come shifted so that the largest of a row is zero: exp(y) is then a token's probability relative to the most
likely one. Each filter sees the distribution that the one before it left, renormalised:

top_k   the first k of the order survive, exactly k of them: of equal logits at the border the smaller ids.
min_p   (Nguyen et al. 2024) tokens of at least ``min_p`` times the largest probability survive, so equal ones share
        a fate.
top_p   (Holtzman et al. 2019, nucleus) the shortest prefix of the order with a mass of at least ``top_p`` survives: a
        token does if the mass before it is smaller than top_p. Of equal ones at the border the smaller ids survive.

The first of the order always survives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASS_BITS = 40
OFF_TOP_P = 2.0  # a mass that no prefix reaches


def log_min_p(min_p: float) -> float:
    """The least shifted logit that survives ``min_p``; minus infinity when the filter is off."""
    return math.log(min_p) if min_p > 0 else -math.inf


def surviving(y_GW: Tensor, top_k_G: Tensor, log_min_p_G: Tensor, top_p_G: Tensor) -> Tensor:
    """Which tokens [G, W] bool survive all three filters.

    ``y_GW``: shifted logits in order. ``top_k_G`` int64 in [1, W], W for off. ``log_min_p_G`` float32, see
    ``log_min_p``. ``top_p_G`` float64, ``OFF_TOP_P`` for off.

    The mass is counted in integers of 2**-40 of the largest probability: sums of integers do not depend on the order
    in which a device adds them, so neither does the set that survives.
    """
    rank_W = torch.arange(y_GW.shape[1], device=y_GW.device)
    keep_GW = rank_W < top_k_G[:, None]
    keep_GW &= y_GW >= log_min_p_G[:, None]
    mass_GW = torch.where(keep_GW, y_GW.exp(), 0.0).to(torch.float64).mul_(2.0**_MASS_BITS).to(torch.int64)
    through_GW = mass_GW.cumsum(dim=1)
    before_GW = through_GW - mass_GW
    enough_G1 = through_GW[:, -1:].to(torch.float64) * top_p_G[:, None]
    keep_GW &= before_GW.to(torch.float64) < enough_G1
    return keep_GW
