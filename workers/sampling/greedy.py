"""The largest logit of each row, and what is wrong with a row that has none.

Legend: R = rows, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NAN, PLUS_INF, ALL_MINUS_INF = -1, -2, -3


def largest(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row [R] and its smallest id [R]. NaN counts as the largest, so that logit is finite
    exactly if the row has no NaN, no +Inf and not only -Inf: the check costs nothing beyond the argmax."""
    if x_RV.device.type == "cpu":
        return _largest_on_cpu(x_RV)
    id_R = x_RV.argmax(dim=1)
    return x_RV.gather(1, id_R[:, None])[:, 0], id_R


def coded(best_R: Tensor, id_R: Tensor) -> Tensor:
    """The ids [R], or NAN, PLUS_INF or ALL_MINUS_INF where the largest logit is not finite."""
    if best_R.device.type == "cpu" and np.isfinite(best_R.numpy()).all():
        return id_R  # a device would have to be waited for to know this
    infinite_R = torch.where(best_R > 0, PLUS_INF, ALL_MINUS_INF)
    return torch.where(best_R.isfinite(), id_R, torch.where(best_R.isnan(), NAN, infinite_R))


def _largest_on_cpu(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The same through numpy, whose vectorised argmax took a tenth of the time of torch's at V = 8192."""
    x = x_RV.numpy()
    ids = x.argmax(axis=1)
    return torch.from_numpy(x[np.arange(len(ids)), ids]), torch.from_numpy(ids)
