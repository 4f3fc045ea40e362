"""The tensors behind the blocks: how large a block is, and all of them at once.

Legend: N blocks, C slabs, b tokens per block, D slab width. A layer's cache is ``kv_NCbD``; what the slabs hold is the
business of the layer's attention block (keys and values of each head here; one slab with a latent for MLA).

Layers with the same window share block tables and are one *group*. Block ids of two groups have nothing to do with
each other: each group has its own number of blocks. Block 0 is never written: padding in block tables points at it, so
it must stay finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one token leaves behind in one layer: ``slabs`` × ``width`` numbers on this rank."""

    group: int
    slabs: int
    width: int


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The cache of one rank's model."""

    layers: tuple[LayerCache, ...]
    windows: tuple[int | None, ...]  # one per group
    dtype: torch.dtype
    device: torch.device

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def bytes_per_block(self, group: int, block_size: int) -> int:
        """Memory of one block id of ``group`` over all its layers, on this rank."""
        numbers = sum(layer.slabs * layer.width for layer in self.layers if layer.group == group)
        return numbers * block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int | Sequence[int], block_size: int) -> KVCache:
        """All blocks, zeroed: ``num_blocks`` of each group, or one number per group. Block 0 counts."""
        per_group = [num_blocks] * self.num_groups if isinstance(num_blocks, int) else list(num_blocks)
        if len(per_group) != self.num_groups or min(per_group, default=1) < 1 or block_size < 1:
            raise ValueError(
                f"need {self.num_groups} positive numbers of blocks and a positive block size, "
                f"not {per_group} and {block_size}"
            )
        return KVCache(
            tuple(
                torch.zeros(
                    per_group[layer.group], layer.slabs, block_size, layer.width, dtype=self.dtype, device=self.device
                )
                for layer in self.layers
            ),
            block_size,
        )


@dataclass(frozen=True, slots=True)
class KVCache:
    """One tensor per layer."""

    layers: tuple[Tensor, ...]  # kv_NCbD
    block_size: int

    @property
    def num_bytes(self) -> int:
        return sum(kv_NCbD.nbytes for kv_NCbD in self.layers)
