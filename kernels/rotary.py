"""Rotary position embedding (Su et al. 2021) in the half-split form that Hugging Face checkpoints use.

Legend: T tokens, H heads, D rotated width (even). Pair i of a head is (x[i], x[i + D/2]).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(angles_Th: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos_T1D and *signed* sin_T1D for ``angles_Th`` (T × D/2, fp32): the first half of sin is negated, so that a
    rotation is one roll, one product and one multiply-add."""
    angles_T1D = torch.cat((angles_Th, angles_Th), -1).unsqueeze(1)
    cos_T1D, sin_T1D = angles_T1D.cos(), angles_T1D.sin()
    sin_T1D[..., : angles_Th.shape[1]].neg_()
    return (cos_T1D, sin_T1D) if scale == 1 else (cos_T1D * scale, sin_T1D * scale)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotated heads in the tables' dtype (fp32): the caller rounds once, when it stores them."""
    half = x_THD.shape[-1] // 2
    return torch.addcmul(x_THD * cos_T1D, torch.roll(x_THD, half, -1), sin_T1D)


def rotate_reference(x_THD: Tensor, angles_Th: Tensor, scale: float) -> Tensor:
    """The definition: each pair as a complex number times ``scale * exp(i * angle)``, in complex128."""
    half = x_THD.shape[-1] // 2
    pairs_THh = torch.complex(x_THD[..., :half].double(), x_THD[..., half:].double())
    turned_THh = pairs_THh * torch.polar(torch.full_like(angles_Th, scale).double(), angles_Th.double()).unsqueeze(1)
    return torch.cat((turned_THh.real, turned_THh.imag), -1).float()
