"""The one product that every matrix kernel here is made of.

Legend: O rows of a weight (output features) of a tile, N rows of activations of a tile, K their common features.

A tile of the result is ``w_OK @ x_NK.T``: the weight stands on the left. Then whatever the number of rows, one family
of instructions computes it, ``wgmma m64nNk16`` (sm_90), of which only N follows the rows; one row costs a tile of 16
columns whose other columns are thrown away, which is free while reading weights is what takes time. An element is one
chain of such instructions in the order of K, whatever the tile: so a row's bits depend on the weight and on the row
alone. That an element of one wgmma depends on its row, its column and its accumulator only, and not on N, is taken
from the chip; the suite checks it there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    w_ptr_O,
    x_ptr_N,
    start,
    stop,
    ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 acc_ON over features ``start`` to ``stop`` of rows of length ``ROW``, of which each pointer names one. Only
    the last part of a row may end within a block of K; what is beyond counts as zero."""
    k = tl.arange(0, BLOCK_K)
    acc_ON = tl.zeros((w_ptr_O.shape[0], x_ptr_N.shape[0]), tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        if ROW % BLOCK_K == 0:
            w_OK = tl.load(w_ptr_O[:, None] + (k0 + k)[None, :])
            x_NK = tl.load(x_ptr_N[:, None] + (k0 + k)[None, :])
        else:
            w_OK = tl.load(w_ptr_O[:, None] + (k0 + k)[None, :], mask=(k0 + k)[None, :] < ROW, other=0.0)
            x_NK = tl.load(x_ptr_N[:, None] + (k0 + k)[None, :], mask=(k0 + k)[None, :] < ROW, other=0.0)
        acc_ON = tl.dot(w_OK, tl.trans(x_NK), acc_ON, input_precision="ieee")
    return acc_ON


@triton.jit
def product_fp8(w_ptr_O, scale_ptr_O, x_ptr_N, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """The same for e4m3 weights with a scale for each ``BLOCK`` x ``BLOCK``, 128. A row of activations is rounded to
    e4m3 with a scale for each 128 of its features (DeepSeek-V3, section 3.3), and each 128 products are added up by
    themselves: the matrix unit keeps only some 14 bits of a sum of e4m3 products."""
    k = tl.arange(0, BLOCK)
    acc_ON = tl.zeros((w_ptr_O.shape[0], x_ptr_N.shape[0]), tl.float32)
    for block in range(tl.cdiv(ROW, BLOCK)):
        at_K = block * BLOCK + k
        if ROW % BLOCK == 0:
            w_OK = tl.load(w_ptr_O[:, None] + at_K[None, :])
            x_NK = tl.load(x_ptr_N[:, None] + at_K[None, :]).to(tl.float32)
        else:
            w_OK = tl.load(w_ptr_O[:, None] + at_K[None, :], mask=at_K[None, :] < ROW, other=0.0)
            x_NK = tl.load(x_ptr_N[:, None] + at_K[None, :], mask=at_K[None, :] < ROW, other=0.0).to(tl.float32)
        w_scale_O = tl.load(scale_ptr_O + block)
        largest_N = tl.max(tl.where(x_NK == x_NK, tl.abs(x_NK), float("inf")), 1)
        x_scale_N = tl.maximum(largest_N, 1e-30) / 448.0  # the largest e4m3
        q_NK = (x_NK / x_scale_N[:, None]).to(tl.float8e4nv)
        acc_ON += tl.dot(w_OK, tl.trans(q_NK)) * (w_scale_O[:, None] * x_scale_N[None, :])
    return acc_ON
