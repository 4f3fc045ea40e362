"""Head norm, rotation and the write into the cache, in one pass over a step's queries, keys and values.

Legend: T tokens, N heads of queries, keys and values together, Q query heads, H key/value heads, D head width, C slabs
of a block (2 H), b tokens of a block; n heads of one program.

A head is three runs of numbers: the two halves that rotation mixes and the rest behind them. A thread holds the same
place of both halves, so queries can be written over what was read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 4  # of one program, a warp each


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_write_kernel(
    qkv_ptr,  # [T, N, D]
    cos_ptr,  # fp32 [T, rotary_dim]
    sin_ptr,  # fp32 [T, rotary_dim], signed
    weight_ptr,  # fp32 [Q + H, D], or None: no norm
    slot_ptr,  # int64 [T]; negative: padding
    scale_ptr,  # fp32 [C], what the cache is multiplied with when it is read; or None
    kv_ptr,  # [blocks, C, b, D]
    num_tokens,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,  # a power of two that holds half of ROTARY_DIM
    REST: tl.constexpr,  # a power of two that holds the numbers that are not rotated
    HEADS: tl.constexpr,
):
    MIDDLE: tl.constexpr = ROTARY_DIM // 2
    NUM_ROTATED: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    NUM_SLABS: tl.constexpr = 2 * NUM_KV_HEADS
    token = tl.program_id(0)
    head_n = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HALF)
    rest = tl.arange(0, REST)
    in_half = (head_n < NUM_HEADS + NUM_SLABS)[:, None] & (half < MIDDLE)[None, :]
    in_rest = (head_n < NUM_HEADS + NUM_SLABS)[:, None] & (rest < HEAD_DIM - ROTARY_DIM)[None, :]
    first_nh = head_n[:, None] * HEAD_DIM + half[None, :]
    rest_nr = head_n[:, None] * HEAD_DIM + ROTARY_DIM + rest[None, :]

    row_ptr = qkv_ptr + token.to(tl.int64) * ((NUM_HEADS + NUM_SLABS) * HEAD_DIM)
    x_nh = tl.load(row_ptr + first_nh, mask=in_half, other=0.0).to(tl.float32)
    y_nh = tl.load(row_ptr + first_nh + MIDDLE, mask=in_half, other=0.0).to(tl.float32)
    z_nr = tl.load(row_ptr + rest_nr, mask=in_rest, other=0.0).to(tl.float32)
    is_rotated = (head_n < NUM_ROTATED)[:, None]
    if weight_ptr is not None:
        squares_n = tl.sum(x_nh * x_nh, 1) + tl.sum(y_nh * y_nh, 1) + tl.sum(z_nr * z_nr, 1)
        inverse_n1 = (1.0 / tl.sqrt_rn(squares_n / HEAD_DIM + eps))[:, None]
        weighs, weighs_rest = in_half & is_rotated, in_rest & is_rotated
        x_w = tl.load(weight_ptr + first_nh, mask=weighs, other=0.0)
        y_w = tl.load(weight_ptr + first_nh + MIDDLE, mask=weighs, other=0.0)
        z_w = tl.load(weight_ptr + rest_nr, mask=weighs_rest, other=0.0)
        x_nh = tl.where(is_rotated, x_nh * inverse_n1 * x_w, x_nh)
        y_nh = tl.where(is_rotated, y_nh * inverse_n1 * y_w, y_nh)
        z_nr = tl.where(is_rotated, z_nr * inverse_n1 * z_w, z_nr)
    angle = token.to(tl.int64) * ROTARY_DIM + half
    has_angle = half < MIDDLE
    x_cos = tl.load(cos_ptr + angle, mask=has_angle, other=0.0)[None, :]
    y_cos = tl.load(cos_ptr + angle + MIDDLE, mask=has_angle, other=0.0)[None, :]
    x_sin = tl.load(sin_ptr + angle, mask=has_angle, other=0.0)[None, :]
    y_sin = tl.load(sin_ptr + angle + MIDDLE, mask=has_angle, other=0.0)[None, :]
    turned_x_nh = tl.where(is_rotated, x_nh * x_cos + y_nh * x_sin, x_nh)
    turned_y_nh = tl.where(is_rotated, y_nh * y_cos + x_nh * y_sin, y_nh)

    is_query = (head_n < NUM_HEADS)[:, None]
    tl.store(row_ptr + first_nh, turned_x_nh.to(qkv_ptr.dtype.element_ty), mask=in_half & is_query)
    tl.store(row_ptr + first_nh + MIDDLE, turned_y_nh.to(qkv_ptr.dtype.element_ty), mask=in_half & is_query)
    tl.store(row_ptr + rest_nr, z_nr.to(qkv_ptr.dtype.element_ty), mask=in_rest & is_query)

    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        slab_n = head_n - NUM_HEADS
        offset = (slot % BLOCK_SIZE).to(tl.int32)
        if scale_ptr is not None:
            is_slab = (slab_n >= 0) & (slab_n < NUM_SLABS)
            inverse_n1 = 1.0 / tl.load(scale_ptr + slab_n, mask=is_slab, other=1.0)[:, None]
            # e4m3 has no infinity: what is too large for it becomes its largest number. A NaN stays one.
            turned_x_nh = tl.clamp(turned_x_nh * inverse_n1, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            turned_y_nh = tl.clamp(turned_y_nh * inverse_n1, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            z_nr = tl.clamp(z_nr * inverse_n1, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        block_ptr_n1 = kv_ptr + slot // BLOCK_SIZE * (NUM_SLABS * BLOCK_SIZE * HEAD_DIM)
        block_ptr_n1 += (slab_n * (BLOCK_SIZE * HEAD_DIM))[:, None]
        to_ptr_n1 = block_ptr_n1 + offset * HEAD_DIM
        to_half = in_half & (slab_n >= 0)[:, None]
        to_rest = in_rest & (slab_n >= 0)[:, None]
        kind = kv_ptr.dtype.element_ty
        tl.store(to_ptr_n1 + half[None, :], turned_x_nh.to(kind), mask=to_half)
        tl.store(to_ptr_n1 + half[None, :] + MIDDLE, turned_y_nh.to(kind), mask=to_half)
        tl.store(to_ptr_n1 + rest[None, :] + ROTARY_DIM, z_nr.to(kind), mask=to_rest)
        # The last of a run of slots empties what is behind it in a block that the run has begun.
        next_slot = tl.load(slot_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
        first_slot = tl.load(slot_ptr + token - offset, mask=token >= offset, other=-1)
        if (next_slot != slot + 1) & (first_slot == slot - offset):
            nothing_nh = tl.zeros((HEADS, HALF), tl.float32).to(kind)
            nothing_nr = tl.zeros((HEADS, REST), tl.float32).to(kind)
            for empty in range(offset + 1, BLOCK_SIZE):
                to_ptr_n1 = block_ptr_n1 + empty * HEAD_DIM
                tl.store(to_ptr_n1 + half[None, :], nothing_nh, mask=to_half)
                tl.store(to_ptr_n1 + half[None, :] + MIDDLE, nothing_nh, mask=to_half)
                tl.store(to_ptr_n1 + rest[None, :] + ROTARY_DIM, nothing_nr, mask=to_rest)


def rotate_write_(
    qkv_TND: Tensor,
    cos_T1D: Tensor,
    sin_T1D: Tensor,
    norm_weight_ND: Tensor | None,
    eps: float,
    slot_T: Tensor,
    kv_NCbD: Tensor,
    num_heads: int,
    scale_C: Tensor | None = None,
) -> None:
    """Normalises (where there is a weight) and rotates query and key heads in fp32, rounds once, leaves queries where
    they were and keys and values in their slots of the cache; key and value heads of ``qkv_TND`` stay as they are.

    A token whose slot is negative is padding: it leaves nothing. Where the slot of a block's first token is written,
    the slots behind the last one written in it are emptied, so that nobody reads what another sequence left. The slots
    of one sequence's tokens must stand together, in order. ``scale_C`` goes with a cache of e4m3: what is stored is
    ``value / scale`` of its slab. Defined by ``PlainAttention.apply``, except that the norm is not rounded on its own.
    """
    num_tokens, all_heads, head_dim = qkv_TND.shape
    _, num_slabs, block_size, _ = kv_NCbD.shape
    rotary_dim = cos_T1D.shape[-1]
    assert all(tensor.is_contiguous() for tensor in (qkv_TND, kv_NCbD))
    assert all_heads == num_heads + num_slabs, (all_heads, num_heads, num_slabs)
    rotate_write_kernel[(num_tokens, triton.cdiv(all_heads, HEADS))](
        qkv_TND,
        cos_T1D.contiguous(),
        sin_T1D.contiguous(),
        norm_weight_ND,
        slot_T,
        scale_C,
        kv_NCbD,
        num_tokens,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_slabs // 2,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_SIZE=block_size,
        HALF=triton.next_power_of_2(rotary_dim // 2),
        REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        HEADS=HEADS,
        num_warps=HEADS,
        enable_fp_fusion=False,
    )
