"""The second kernel of attention with split keys: what the segments of a query amount to, joined in order.

Legend: T tokens, Q query heads, H key/value heads, G query heads per key/value head, D head width, C slabs of a cache
block (2 H), N query blocks, P segments, R rows of a query block that count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.cuda.online_softmax import finish, join

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_seen(first_query, WINDOW: tl.constexpr):
    """The first key that the first query of a block sees."""
    return tl.maximum(first_query - WINDOW + 1, 0) if WINDOW > 0 else first_query * 0


@triton.jit
def load_sinks(sinks_ptr, head_M):
    """In units of log 2, as the scores are."""
    sink_M = tl.full(head_M.shape, float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink_M = tl.load(sinks_ptr + head_M).to(tl.float32) * LOG2_E
    return sink_M


@triton.jit(do_not_specialize=["num_blocks", "num_splits", "rows_kept"])
def join_kernel(
    blocks_ptr,  # int32 [4, N]
    sinks_ptr,
    scale_ptr,
    out_ptr,
    partial_ptr,
    partial_ml_ptr,
    num_blocks,
    num_splits,
    rows_kept,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Joins the segments of one row of a query block, in order."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    block, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(blocks_ptr + num_blocks + block).to(tl.int64)
    num_queries = tl.load(blocks_ptr + 2 * num_blocks + block)
    first_query = tl.load(blocks_ptr + 3 * num_blocks + block)
    query = row // GROUP
    if query >= num_queries:
        return
    begin = first_seen(first_query, WINDOW) // BLOCK_N * BLOCK_N
    num_segments = (first_query + num_queries - 1) // SEGMENT - begin // SEGMENT + 1

    one = tl.arange(0, 1)  # a tile of one row, so that it is joined as those of many rows are
    d = tl.arange(0, BLOCK_D)
    inside = (d < HEAD_DIM)[None, :]
    m_1 = tl.full((1,), float("-inf"), tl.float32)
    l_1 = tl.zeros((1,), tl.float32)
    acc_1D = tl.zeros((1, BLOCK_D), tl.float32)
    first_cell = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * num_splits
    for segment in range(num_segments):
        cell = first_cell + segment
        segment_m_1 = tl.load(partial_ml_ptr + cell * 2 * rows_kept + row + one)
        segment_l_1 = tl.load(partial_ml_ptr + (cell * 2 + 1) * rows_kept + row + one)
        acc_ptr_1D = partial_ptr + (cell * rows_kept + row) * HEAD_DIM + one[:, None] + d[None, :]
        segment_acc_1D = tl.load(acc_ptr_1D, mask=inside, other=0.0)
        m_1, l_1, acc_1D = join(m_1, l_1, acc_1D, segment_m_1, segment_l_1, segment_acc_1D)
    head = kv_head * GROUP + row % GROUP
    v_scale = 1.0
    if scale_ptr is not None:
        v_scale = tl.load(scale_ptr + NUM_KV_HEADS + kv_head)
    out_1D = finish(m_1, l_1, acc_1D, load_sinks(sinks_ptr, head + one), v_scale)
    out_ptr_1D = out_ptr + (first_token + query) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + one[:, None] + d[None, :]
    tl.store(out_ptr_1D, out_1D.to(out_ptr.dtype.element_ty), mask=inside)
