"""With how many rows a product may be called so that every row gets the same bits.

Legend: T rows, I input features, O output features.

A matrix library picks its kernel by the shape of the call, the number of rows included, and kernels add up in different
orders: the same row can come out differently alone and in a crowd. Here a product is only ever called with row counts
of a short list, and only with those of them that were seen to agree bit by bit with one reference call. Other
numbers of rows are cut into such calls, the last one padded. Which counts agree depends on the library, the
weight's shape and dtype, never on the rows.

The short list also bounds what oneDNN keeps: it compiles and caches a kernel for each number of rows it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

REFERENCE_ROWS = 16
"""The call that others are compared to, and the only one that is used where none agrees with it."""

_COUNTS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256, 384, 512)
_PADDING_SHARE = 16  # a call is padded by at most this part of its rows (or 3), else cut


@dataclass(frozen=True)
class RowTiles:
    """The row counts, ascending, that give a row the same bits."""

    counts: tuple[int, ...]

    @cached_property
    def exact(self) -> frozenset[int]:
        return frozenset(self.counts)

    def fit(self, rows: int) -> int | None:
        """The smallest count that holds ``rows``; None when there is none."""
        return next((count for count in self.counts if count >= rows), None)

    def cut(self, rows: int) -> list[tuple[int, int]]:
        """(rows, count) of each call, in order: ``rows`` of them are wanted, the rest up to ``count`` is padding."""
        calls = []
        while rows:
            fit = self.fit(rows)
            below = max((count for count in self.counts if count <= rows), default=None)
            if fit is not None and (below is None or fit - rows <= max(3, rows // _PADDING_SHARE)):
                calls.append((rows, fit))
                break
            assert below is not None
            calls.append((below, below))
            rows -= below
        return calls

    def apply(self, product: Product, x_TI: Tensor, out_features: int) -> Tensor:
        """``product(x_TI)`` in calls of the allowed counts."""
        rows = x_TI.shape[0]
        if rows == 0:  # oneDNN refuses an empty product
            return x_TI.new_empty(0, out_features)
        pieces, start = [], 0
        for wanted, count in self.cut(rows):
            x_tI = x_TI[start : start + wanted]
            pieces.append(product(x_tI) if count == wanted else product(_padded(x_tI, count))[:wanted])
            start += wanted
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _padded(x_tI: Tensor, rows: int) -> Tensor:
    out_cI = x_tI.new_zeros(rows, x_tI.shape[1])
    out_cI[: x_tI.shape[0]] = x_tI
    return out_cI


def row_counts(most: int) -> tuple[int, ...]:
    """The short list, up to ``most`` rows but not without the reference."""
    octaves = (1024, 2048)
    return tuple(count for count in (*_COUNTS, *octaves) if count <= max(most, REFERENCE_ROWS))


def agreeing_rows(product: Product, x_PI: Tensor, counts: Sequence[int]) -> RowTiles:
    """Those of ``counts`` with which ``product`` gives every one of equal rows the bits of the reference call with one
    thread, whether it has one thread or as many as torch uses now. Each of the P rows is tried in turn."""
    agreeing = set(counts)
    for x_1I in x_PI.unsqueeze(1):
        with _threads(1):
            want_1O = product(x_1I.repeat(REFERENCE_ROWS, 1))[:1]
        for threads in {1, torch.get_num_threads()}:
            with _threads(threads):
                agreeing = {count for count in agreeing if bool((product(x_1I.repeat(count, 1)) == want_1O).all())}
    return RowTiles(tuple(sorted(agreeing | {REFERENCE_ROWS})))


@contextmanager
def _threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cancelling_operands(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x_PI and w_OI whose products are sums that cancel: what remains is the noise of rounding, which shows the order
    of accumulation even after the result was rounded to a short dtype. Fewer outputs make up for it with more rows."""
    generator = torch.Generator().manual_seed(seed)
    half, order = in_features // 2, torch.randperm(in_features, generator=generator)
    num_rows, pattern = max(1, 32 // max(1, out_features)), min(out_features, 64)
    x_Ph, w_Oh = torch.randn(num_rows, half, generator=generator), torch.randn(pattern, half, generator=generator)
    odd_P, odd_O = (torch.zeros(num, in_features - 2 * half) for num in (num_rows, pattern))
    x_PI = torch.cat((x_Ph, -x_Ph, odd_P), 1)[:, order].to(device, dtype)
    w_OI = torch.cat((w_Oh, w_Oh, odd_O), 1)[:, order].to(device, dtype)
    return x_PI, w_OI.repeat(-(-out_features // max(1, pattern)), 1)[:out_features]
