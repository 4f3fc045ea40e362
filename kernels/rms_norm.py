"""Root mean square normalisation (Zhang and Sennrich 2019).

Legend: D normalised width; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_D: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension; reduced in fp32, returned in the dtype of x."""
    return functional.rms_norm(x_D, (x_D.shape[-1],), weight_D, eps)


def rms_norm_reference(x_D: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """The definition, in fp64."""
    wide_D = x_D.double()
    out_D = wide_D / torch.sqrt(wide_D.square().mean(-1, keepdim=True) + eps)
    return (out_D if weight_D is None else out_D * weight_D.double()).to(x_D.dtype)
