"""Adding to the residual stream and normalising it, in one pass over memory.

Legend: T rows, M model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [T, M]
    delta_ptr,  # [T, M] or None
    weight_ptr,  # [M]
    sum_ptr,  # [T, M], x itself; not written without delta
    out_ptr,  # [T, M]
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least WIDTH
):
    m = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + m
    inside = m < WIDTH
    x_M = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta_M = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sum_M = (x_M + delta_M).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, sum_M, mask=inside)
        x_M = sum_M.to(tl.float32)
    mean = tl.sum(x_M * x_M, 0) / WIDTH
    inverse = 1.0 / tl.sqrt_rn(mean + eps)
    weight_M = tl.load(weight_ptr + m, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x_M * inverse * weight_M).to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(x_TM: Tensor, delta_TM: Tensor | None, weight_M: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, rounded to the dtype of x, and its RMS norm times ``weight``: reduced in fp32, rounded once. The
    sum is left in ``x_TM``, which is returned; without ``delta_TM`` x stays as it is. A row is reduced by one program
    in an order that its width alone decides. Its definition: ``rms_norm.rms_norm_reference`` of the sum.
    """
    num_rows, width = x_TM.shape
    assert x_TM.is_contiguous(), "the residual stream is written in place"
    out_TM = torch.empty_like(x_TM)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(num_rows,)](
        x_TM,
        None if delta_TM is None else delta_TM.contiguous(),
        weight_M,
        x_TM,
        out_TM,
        eps,
        WIDTH=width,
        BLOCK=block,
        num_warps=norm_warps(block),
        enable_fp_fusion=False,
    )
    return x_TM, out_TM


def norm_warps(block: int) -> int:
    """16 bytes of bf16 a thread, where the row is long enough."""
    return min(16, max(1, block // 256))
