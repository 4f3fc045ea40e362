"""One total order of the tokens of a row: the larger logit first, the smaller id among equals.

Legend: G = rows, V = vocabulary, W = the first W of the order.

A logit and its token id are packed into one int64, so that any sort or top-k, stable or not, on any device, gives the
same answer: no two keys of a row are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(x_GV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The first ``width`` tokens of each row in order: logits [G, W] float32 and ids [G, W] int64.

    NaNs are given some place; the caller rejects such rows.
    """
    vocab_size = x_GV.shape[1]
    key_GV = _pack(x_GV)
    if width < vocab_size:
        key_GW = torch.topk(key_GV, width, dim=1, largest=True, sorted=True).values
    else:
        key_GW = torch.sort(key_GV, dim=1, descending=True).values
    return _unpack(key_GW, vocab_size)


def _pack(x_GV: Tensor) -> Tensor:
    bits_GV = (x_GV + 0.0).view(torch.int32)  # adding zero makes one of the two zeros
    order_GV = _flip_negatives(bits_GV)
    vocab_size = x_GV.shape[1]
    reverse_V = torch.arange(vocab_size - 1, -1, -1, dtype=torch.int64, device=x_GV.device)
    return order_GV.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(reverse_V)


def _unpack(key_GW: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    id_GW = (vocab_size - 1) - (key_GW & 0xFFFFFFFF)
    order_GW = (key_GW >> 32).to(torch.int32)
    return _flip_negatives(order_GW).view(torch.float32), id_GW


def _flip_negatives(bits: Tensor) -> Tensor:
    """Float bits become integers of the same order, and back: the magnitude of negative ones is complemented."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
