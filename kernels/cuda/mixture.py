"""The two products of a mixture's experts, for rows spread over experts as they may be.

Legend: P (token, slot) pairs or rows sorted by slot, K pairs per token, T tokens, L slots, D model width, I expert
width, O outputs of a product and H its input features, N rows of a tile, B tiles.

Gate and up rows of a weight alternate by eight in a tile, so that one product holds both of an element in one
thread's registers and the activation needs no exchange. Hidden rows and results stand where their pair does: nothing
is permuted.

A program learns in one of two ways which rows are its own: from the table of ``rows.py``; or, for few pairs, by
comparing all slots with that of its pair: the first pair of a slot computes all of that slot, the others leave at
once. The second needs no sorting and is one launch less ("warp decode" without its other order of sums).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.cuda.product import product, product_fp8


@triton.jit
def _rows_by_comparison(slots_ptr, pair, num_pairs, PAIRS: tl.constexpr, N: tl.constexpr):
    """slot, pair_N and valid_N of the program that stands for ``pair``; nothing valid where another computes it."""
    p_P = tl.arange(0, PAIRS)
    n = tl.arange(0, N)
    slot = tl.load(slots_ptr + pair).to(tl.int32)
    same_P = (tl.load(slots_ptr + p_P, mask=p_P < num_pairs, other=-1).to(tl.int32) == slot).to(tl.int32)
    before = tl.sum(tl.where(p_P < pair, same_P, 0), 0)
    count = tl.where(before % N == 0, tl.sum(same_P, 0) - before, 0)
    place_P = tl.cumsum(same_P, 0) - 1 - before
    mine_NP = (same_P[None, :] == 1) & (place_P[None, :] == n[:, None])
    pair_N = tl.sum(tl.where(mine_NP, p_P[None, :], 0), 1)
    return slot, pair_N, n < count


@triton.jit
def _rows_of_tile(table_ptr, order_ptr, tile, num_tiles, N: tl.constexpr):
    slot = tl.load(table_ptr + tile)
    first = tl.load(table_ptr + num_tiles + tile)
    end = tl.load(table_ptr + 2 * num_tiles + tile)
    place_N = first + tl.arange(0, N)
    valid_N = place_N < end
    # The other columns compute row 0 once more: nothing needs a mask until the results.
    place_N = tl.where(valid_N, place_N, 0)
    if order_ptr is not None:
        place_N = tl.load(order_ptr + place_N)
    return tl.maximum(slot, 0), place_N, valid_N


@triton.jit
def _product(w_ptr, scale_ptr, slot, row_O, x_ptr_N, O: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of rows ``row_O`` of a slot's weight [O, H]."""
    w_ptr_O = w_ptr + (slot.to(tl.int64) * O + row_O) * H
    if scale_ptr is None:
        return product(w_ptr_O, x_ptr_N, 0, H, H, BLOCK_K)
    else:
        # BLOCK_K is that of the scales.
        BLOCKS_O: tl.constexpr = (O + BLOCK_K - 1) // BLOCK_K
        BLOCKS_H: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
        scale_ptr_O = scale_ptr + (slot * BLOCKS_O + row_O // BLOCK_K) * BLOCKS_H
        return product_fp8(w_ptr_O, scale_ptr_O, x_ptr_N, H, BLOCK_K)


@triton.jit
def _halves(acc_ON):
    """Gate and up of a tile whose rows alternate by eight: two rows of a thread's registers."""
    O: tl.constexpr = acc_ON.shape[0]
    N: tl.constexpr = acc_ON.shape[1]
    gate, up = tl.split(tl.permute(tl.reshape(acc_ON, (O // 16, 2, 8, N)), (0, 2, 3, 1)))
    return tl.reshape(gate, (O // 2, N)), tl.reshape(up, (O // 2, N))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "num_slots", "num_sums"])
def gate_up_kernel(
    w_ptr,  # [L, 2I, D], gate rows before up rows
    scale_ptr,  # fp32, of e4m3 weights; else None
    bias_ptr,  # [L, 2I] or None
    x_ptr,  # [T, D]; pair p is of row p // K
    hidden_ptr,  # [P, I]
    slots_ptr,  # [P], or None with a table
    counts_ptr,  # int64 [L]: where to write how many pairs each slot has; None with a table
    arrived_ptr,  # int32, num_sums zeros for ``down_kernel``; None with a table
    table_ptr,  # of rows.py, or None
    order_ptr,  # of rows.py, or None
    num_pairs,
    num_tiles,
    num_slots,
    num_sums,
    K: tl.constexpr,
    I: tl.constexpr,
    D: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,  # 0: none
    UP_SHIFT: tl.constexpr,
    PAIRS: tl.constexpr,  # a power of two, at least num_pairs
    SLOTS: tl.constexpr,  # a power of two, more than num_slots
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden_PI = up * gate * sigmoid(ALPHA * gate), in fp32 and rounded once."""
    BLOCK_I: tl.constexpr = BLOCK_O // 2
    NUM_O: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    pid = tl.program_id(0)
    if table_ptr is None:
        if pid == 0:
            _count_and_clear(slots_ptr, counts_ptr, arrived_ptr, num_pairs, num_slots, num_sums, PAIRS, SLOTS)
        slot, pair_N, valid_N = _rows_by_comparison(slots_ptr, pid // NUM_O, num_pairs, PAIRS, BLOCK_N)
    else:
        slot, pair_N, valid_N = _rows_of_tile(table_ptr, order_ptr, pid // NUM_O, num_tiles, BLOCK_N)
    if tl.max(valid_N.to(tl.int32), 0) == 0:
        return
    first_i = pid % NUM_O * BLOCK_I
    o_O = tl.arange(0, BLOCK_O)
    row_O = tl.minimum(first_i + o_O // 16 * 8 + o_O % 8, I - 1) + o_O % 16 // 8 * I
    x_ptr_N = x_ptr + (pair_N // K).to(tl.int64) * D
    acc_ON = _product(w_ptr, scale_ptr, slot, row_O, x_ptr_N, 2 * I, D, BLOCK_K)
    if bias_ptr is not None:
        acc_ON += tl.load(bias_ptr + slot * (2 * I) + row_O).to(tl.float32)[:, None]
    gate_IN, up_IN = _halves(acc_ON)
    if LIMIT > 0:  # by comparisons that keep a NaN
        gate_IN = tl.where(gate_IN > LIMIT, LIMIT, gate_IN)
        up_IN = tl.where(up_IN > LIMIT, LIMIT, tl.where(up_IN < -LIMIT, -LIMIT, up_IN))
    hidden_IN = gate_IN / (1 + tl.exp(-ALPHA * gate_IN)) * (up_IN + UP_SHIFT)
    i_I = first_i + tl.arange(0, BLOCK_I)
    hidden_ptr_IN = hidden_ptr + pair_N[None, :].to(tl.int64) * I + i_I[:, None]
    tl.store(hidden_ptr_IN, hidden_IN.to(hidden_ptr.dtype.element_ty), mask=(i_I[:, None] < I) & valid_N[None, :])


@triton.jit
def _count_and_clear(
    slots_ptr, counts_ptr, arrived_ptr, num_pairs, num_slots, num_sums, PAIRS: tl.constexpr, SLOTS: tl.constexpr
):
    p_P = tl.arange(0, PAIRS)
    l = tl.arange(0, SLOTS)
    slot_P = tl.load(slots_ptr + p_P, mask=p_P < num_pairs, other=SLOTS - 1).to(tl.int32)
    tl.store(counts_ptr + l, tl.histogram(slot_P, SLOTS).to(tl.int64), mask=l < num_slots)
    for start in range(0, num_sums, 256):
        at = start + tl.arange(0, 256)
        tl.store(arrived_ptr + at, tl.zeros((256,), tl.int32), mask=at < num_sums)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def down_kernel(
    w_ptr,  # [L, D, I]
    scale_ptr,
    bias_ptr,  # [L, D] or None
    hidden_ptr,  # [P, I]
    y_ptr,  # [P, D]
    weights_ptr,  # fp32 [T, K], or None: leave the sum to another
    out_ptr,  # [T, D], or None
    arrived_ptr,  # int32 [T, tiles of D] of zeros, or None
    slots_ptr,
    table_ptr,
    order_ptr,
    num_pairs,
    num_tiles,
    K: tl.constexpr,
    I: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y_PD; and with ``weights_ptr`` out_TD too: whichever program is the last of a token's K adds them up, in
    order."""
    NUM_O: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    o_tile = pid % NUM_O
    if table_ptr is None:
        slot, pair_N, valid_N = _rows_by_comparison(slots_ptr, pid // NUM_O, num_pairs, PAIRS, BLOCK_N)
    else:
        slot, pair_N, valid_N = _rows_of_tile(table_ptr, order_ptr, pid // NUM_O, num_tiles, BLOCK_N)
    if tl.max(valid_N.to(tl.int32), 0) == 0:
        return
    o_O = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    row_O = tl.minimum(o_O, D - 1)
    acc_ON = _product(w_ptr, scale_ptr, slot, row_O, hidden_ptr + pair_N.to(tl.int64) * I, D, I, BLOCK_K)
    if bias_ptr is not None:
        acc_ON += tl.load(bias_ptr + slot * D + row_O).to(tl.float32)[:, None]
    y_ptr_ON = y_ptr + pair_N[None, :].to(tl.int64) * D + o_O[:, None]
    tl.store(y_ptr_ON, acc_ON.to(y_ptr.dtype.element_ty), mask=(o_O[:, None] < D) & valid_N[None, :])
    if weights_ptr is not None:
        token_N = pair_N // K
        tl.debug_barrier()  # the whole block has stored before it says so
        arrived_N = tl.atomic_add(arrived_ptr + token_N * NUM_O + o_tile, 1, mask=valid_N, sem="acq_rel")
        last_N = valid_N & (arrived_N == K - 1)
        tl.debug_barrier()
        if tl.max(last_N.to(tl.int32), 0) == 1:
            sum_ON = _weighted_sum(y_ptr, weights_ptr, token_N, last_N, o_O, K, D)
            out_ptr_ON = out_ptr + token_N[None, :].to(tl.int64) * D + o_O[:, None]
            mask_ON = (o_O[:, None] < D) & last_N[None, :]
            tl.store(out_ptr_ON, sum_ON.to(out_ptr.dtype.element_ty), mask=mask_ON)


@triton.jit
def _weighted_sum(y_ptr, weights_ptr, token_N, valid_N, o_O, K: tl.constexpr, D: tl.constexpr):
    """``weighted_sum.weighted_sum``: begins with the first term, no fused multiply-add."""
    mask_ON = (o_O[:, None] < D) & valid_N[None, :]
    pair_N = token_N.to(tl.int64) * K
    sum_ON = tl.zeros((o_O.shape[0], token_N.shape[0]), tl.float32)
    for k in tl.static_range(K):
        weight_N = tl.load(weights_ptr + pair_N + k, mask=valid_N, other=0.0)
        y_ON = tl.load(y_ptr + (pair_N + k)[None, :] * D + o_O[:, None], mask=mask_ON, other=0.0, cache_modifier=".cg")
        term_ON = y_ON.to(tl.float32) * weight_N[None, :]
        sum_ON = term_ON if k == 0 else sum_ON + term_ON
    return sum_ON


@triton.jit
def sum_kernel(y_ptr, weights_ptr, out_ptr, K: tl.constexpr, D: tl.constexpr, BLOCK_O: tl.constexpr):
    """out_TD of y_PD that stands in the order of pairs."""
    NUM_O: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    token_N = pid // NUM_O + tl.zeros((1,), tl.int32)
    o_O = pid % NUM_O * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_ON = _weighted_sum(y_ptr, weights_ptr, token_N, token_N >= 0, o_O, K, D)
    out_ptr_ON = out_ptr + token_N[None, :].to(tl.int64) * D + o_O[:, None]
    tl.store(out_ptr_ON, sum_ON.to(out_ptr.dtype.element_ty), mask=o_O[:, None] < D)
