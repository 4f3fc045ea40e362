"""A dense linear whose rows do not notice each other: qkv, output, gate and head projections.

Legend: T rows, I input and O output features, S parts of I, N rows of a tile, B tiles.

A weight with few outputs would keep only some of the chip's 132 processors reading. So its features are cut into S
parts at places that the weight's shape alone decides. With few rows each part is a program of its own, and whichever
program of a tile comes last adds the parts up in their order; with many rows one program computes them one after the
other. Both add the same numbers in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from moestro.kernels.cuda.product import product
from moestro.kernels.cuda.tiles import (
    MAX_PARALLEL_ROWS,
    Kernel,
    Tile,
    bucket,
    choose_tile,
    part_width,
    tile_count,
)

_GROUP = 16  # tiles of rows that pass by one tile of weights before the next is read


@triton.jit
def _store(y_ptr, bias_ptr, acc_ON, o_O, t_N, num_rows, O: tl.constexpr):
    if bias_ptr is not None:
        acc_ON += tl.load(bias_ptr + o_O, mask=o_O < O, other=0.0).to(tl.float32)[:, None]
    y_ptr_ON = y_ptr + t_N[None, :].to(tl.int64) * O + o_O[:, None]
    tl.store(y_ptr_ON, acc_ON.to(y_ptr.dtype.element_ty), mask=(o_O[:, None] < O) & (t_N[None, :] < num_rows))


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    w_ptr,  # [O, I]
    bias_ptr,  # [O] or None
    x_ptr,  # [T, I]
    y_ptr,  # [T, O]
    partial_ptr,  # fp32 [B, S, BLOCK_O, BLOCK_N], or None where a program computes all parts
    arrived_ptr,  # int32 [B] of zeros, left as zeros
    num_rows,
    O: tl.constexpr,
    I: tl.constexpr,
    PART: tl.constexpr,  # features of a part
    PARALLEL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    NUM_PARTS: tl.constexpr = (I + PART - 1) // PART
    NUM_O: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    tile = pid // NUM_PARTS if PARALLEL else pid
    num_n = tl.cdiv(num_rows, BLOCK_N)
    first_n = tile // (GROUP * NUM_O) * GROUP
    width_n = tl.minimum(num_n - first_n, GROUP)
    o_tile = tile % (GROUP * NUM_O) // width_n
    n_tile = first_n + tile % (GROUP * NUM_O) % width_n

    o_O = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    t_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last are the last once more: nothing needs a mask until the end.
    w_ptr_O = w_ptr + tl.minimum(o_O, O - 1).to(tl.int64) * I
    x_ptr_N = x_ptr + tl.minimum(t_N, num_rows - 1).to(tl.int64) * I

    if PARALLEL:
        part = pid % NUM_PARTS
        start = part * PART
        acc_ON = product(w_ptr_O, x_ptr_N, start, tl.minimum(start + PART, I), I, BLOCK_K)
        cell_ON = tl.arange(0, BLOCK_O)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine_ptr = partial_ptr + tile.to(tl.int64) * (NUM_PARTS * BLOCK_O * BLOCK_N)
        tl.store(mine_ptr + part * (BLOCK_O * BLOCK_N) + cell_ON, acc_ON)
        tl.debug_barrier()  # the whole block has stored before one thread of it says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == NUM_PARTS - 1:
            tl.debug_barrier()
            acc_ON = tl.load(mine_ptr + cell_ON, cache_modifier=".cg")
            for other in range(1, NUM_PARTS):
                acc_ON += tl.load(mine_ptr + other * (BLOCK_O * BLOCK_N) + cell_ON, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _store(y_ptr, bias_ptr, acc_ON, o_O, t_N, num_rows, O)
    else:
        acc_ON = product(w_ptr_O, x_ptr_N, 0, min(PART, I), I, BLOCK_K)
        for part in range(1, NUM_PARTS):
            acc_ON += product(w_ptr_O, x_ptr_N, part * PART, tl.minimum(part * PART + PART, I), I, BLOCK_K)
        _store(y_ptr, bias_ptr, acc_ON, o_O, t_N, num_rows, O)


@dataclass(frozen=True, slots=True)
class CudaLinear:
    """``Linear`` for bf16 and fp32 weights on CUDA; its definition is ``x_TI @ weight_OI.T + bias_O``. For one stream
    at a time. fp32 is multiplied without the matrix unit, which would round it."""

    weight_OI: Tensor
    bias_O: Tensor | None = None
    arrived_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        most_tiles = tile_count(self.weight_OI.shape[0], 64) * tile_count(MAX_PARALLEL_ROWS, 16)
        arrived_B = torch.zeros(most_tiles, dtype=torch.int32, device=self.weight_OI.device)
        object.__setattr__(self, "arrived_B", arrived_B)

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    def apply(self, x_TI: Tensor) -> Tensor:
        kernel: Kernel = "linear" if self.weight_OI.dtype == torch.bfloat16 else "linear_fp32"
        return self.apply_tiled(x_TI, choose_tile(kernel, *self.weight_OI.shape, bucket(x_TI.shape[0])))

    def apply_tiled(self, x_TI: Tensor, tile: Tile) -> Tensor:
        """With a tile of the caller's choice: the bits are the same."""
        num_rows, (out_features, in_features) = x_TI.shape[0], self.weight_OI.shape
        y_TO = torch.empty(num_rows, out_features, dtype=self.weight_OI.dtype, device=x_TI.device)
        if num_rows == 0:
            return y_TO
        part = part_width(out_features, in_features)
        num_parts = tile_count(in_features, part)
        parallel = num_parts > 1 and num_rows <= MAX_PARALLEL_ROWS
        num_tiles = tile_count(out_features, tile.out) * tile_count(num_rows, tile.rows)
        partial = (
            y_TO.new_empty(num_tiles * num_parts * tile.out * tile.rows, dtype=torch.float32) if parallel else None
        )
        linear_kernel[(num_tiles * num_parts if parallel else num_tiles,)](
            self.weight_OI,
            self.bias_O,
            x_TI.contiguous(),
            y_TO,
            partial,
            self.arrived_B,
            num_rows,
            O=out_features,
            I=in_features,
            PART=part,
            PARALLEL=parallel,
            BLOCK_O=tile.out,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.features,
            GROUP=_GROUP,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
        return y_TO
