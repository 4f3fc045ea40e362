"""Digests of hidden states, so that two runs can be compared layer by layer without sending either's numbers.

Legend: T tokens of the step, K rows that are traced, M model width, L layers.

A digest is the sum, modulo 2^64, of the bits of a row's numbers as integers, each times an odd weight of its place
(multiply-shift hashing, Dietzfelbinger et al. 1997, without the shift). One changed number always changes it; several
fail to with a chance of at most 2^-47 at 16 bits a number, 2^-31 at 32. Sums of integers have no order, so every device
agrees.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**64 - 1


class HiddenTrace:
    """Collects the digests of some rows of one forward pass. Nothing leaves the device before ``digests``."""

    def __init__(self, rows_K: Tensor) -> None:
        self._rows_K = rows_K
        self._layers_K: list[Tensor] = []

    def take(self, x_TM: Tensor) -> None:
        """Notes the hidden state after one more layer."""
        self._layers_K.append(digest(x_TM.index_select(0, self._rows_K)))

    def digests(self) -> list[tuple[int, ...]]:
        """For each traced row its digests by layer, unsigned. Waits for the device."""
        if not self._layers_K:
            raise RuntimeError("the model noted no layer: it does not trace")
        rows_KL: list[list[int]] = torch.stack(self._layers_K, 1).tolist()
        return [tuple(value & _MASK for value in row) for row in rows_KL]


def digest(x_KM: Tensor) -> Tensor:
    """digest_K (int64) of the bits of each row."""
    bits_KM = x_KM.contiguous().view(_BITS[x_KM.dtype.itemsize]).to(torch.int64)
    return (bits_KM * _weights(x_KM.shape[1], x_KM.device)).sum(1)


@lru_cache(maxsize=8)
def _weights(width: int, device: torch.device) -> Tensor:
    """weight_M: odd numbers without structure, the outputs of SplitMix64 (Steele et al. 2014) for 0, 1, 2, ..."""
    weights = []
    for index in range(1, width + 1):
        z = index * 0x9E3779B97F4A7C15 & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        odd = (z ^ z >> 31) | 1
        weights.append(odd - 2**64 if odd >= 2**63 else odd)
    return torch.tensor(weights, dtype=torch.int64, device=device)
