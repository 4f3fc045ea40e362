"""A linear layer as a value: weights in some storage format behind ``apply``.

Legend: T rows, I input features, O output features.

Quantized formats and adapters are further kinds of ``Linear``; a model never asks which kind it holds.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moestro.kernels.row_tiles import RowTiles, agreeing_rows, cancelling_operands, row_counts

_ALIGNMENT = 64  # bytes; what torch allocates at
_PROBED_TERMS = 1 << 30
"""Multiplications of the largest call: still more rows would not make a large weight cheaper, only slower to try."""


class Linear(Protocol):
    """y_TO = x_TI @ weight_OI.T + bias_O for any number of rows, zero included. A row's bits do not depend on the rows
    beside it, nor on how many there are."""

    @property
    def out_features(self) -> int: ...

    def apply(self, x_TI: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """Weights as they are; any dtype, any device."""

    weight_OI: Tensor
    bias_O: Tensor | None = None
    tiles: RowTiles = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", _row_tiles(_plain, self.weight_OI, self.bias_O))

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    def apply(self, x_TI: Tensor) -> Tensor:
        if x_TI.data_ptr() % _ALIGNMENT:  # a product of one column begins with what stands before the first vector
            x_TI = x_TI.clone(memory_format=torch.contiguous_format)
        if x_TI.shape[0] in self.tiles.exact:
            return self._product(x_TI)
        return self.tiles.apply(self._product, x_TI, self.out_features)

    def _product(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Weights in oneDNN's blocked layout (CPU). In bf16 a product at one row reads 1.4 times, at four rows 1.7 times as
    fast as ``F.linear``, which repacks on each call; in fp32 2 to 3 times at four rows and more."""

    packed: Tensor
    out_features: int
    bias_O: Tensor | None
    tiles: RowTiles

    def apply(self, x_TI: Tensor) -> Tensor:
        if x_TI.shape[0] in self.tiles.exact:
            return self._product(x_TI)
        return self.tiles.apply(self._product, x_TI, self.out_features)

    def _product(self, x_TI: Tensor) -> Tensor:
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, self.packed, self.bias_O, "none", [], "")
        return out_TO


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights on ``device`` in ``dtype`` gain from oneDNN's layout: on a CPU fp32, and bf16 if it multiplies
    that."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight_OI: Tensor) -> Tensor:
    """``weight_OI`` in oneDNN's layout, for any number of rows. The source may be freed."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
    return packed


def empty_weight(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An unfilled weight_OI on its way into ``make_linear``.

    Where it will be repacked it lives in a mapping of its own, which goes back to the system when it is dropped: on the
    heap, aligned blocks that are freed between packed ones are not used again, and a model took twice its size.
    """
    num_bytes = out_features * in_features * dtype.itemsize
    if num_bytes == 0 or not can_pack(device, dtype):
        return torch.empty(out_features, in_features, dtype=dtype, device=device)
    private = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(private, dtype=dtype).view(out_features, in_features)


def make_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """The fastest kind for where the weight lives. The caller should drop its own reference to ``weight_OI``."""
    if can_pack(weight_OI.device, weight_OI.dtype):
        return PackedLinear(pack(weight_OI), weight_OI.shape[0], bias_O, _row_tiles(_packed, weight_OI, bias_O))
    return PlainLinear(weight_OI, bias_O)


_ProductOf = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


def _plain(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x_TI: functional.linear(x_TI, weight_OI, bias_O)


def _packed(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    return PackedLinear(pack(weight_OI), weight_OI.shape[0], bias_O, RowTiles(()))._product


def _row_tiles(product_of: _ProductOf, weight_OI: Tensor, bias_O: Tensor | None) -> RowTiles:
    """The row counts for a weight of this shape, tried out once per shape and number of threads."""
    if weight_OI.device.type == "meta":  # where a model is only measured
        return RowTiles(row_counts(1))
    shape, has_bias = (weight_OI.shape[0], weight_OI.shape[1]), bias_O is not None
    return _tried(product_of, shape, has_bias, weight_OI.dtype, weight_OI.device, torch.get_num_threads())


@cache
def _tried(
    product_of: _ProductOf,
    shape: tuple[int, int],
    has_bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> RowTiles:
    weight_OI = empty_weight(*shape, dtype, device)
    x_PI, pattern_OI = cancelling_operands(*shape, dtype, device)
    weight_OI.copy_(pattern_OI)
    bias_O = torch.zeros(shape[0], dtype=dtype, device=device) if has_bias else None
    counts = row_counts(_PROBED_TERMS // max(1, weight_OI.numel()))
    return agreeing_rows(product_of(weight_OI, bias_O), x_PI, counts)
