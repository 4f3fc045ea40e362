"""Attention over a paged cache, for one query as for many: one kernel, one order of summation.

Legend: T tokens, Q query heads, H key/value heads, G query heads per key/value head, D head width, C slabs of a cache
block (2 H), b tokens of a cache block, S sequences, B columns of the block table, N query blocks, P segments, R rows of
a query block that count (queries * G).
In kernels: M rows and N keys of a tile.

A program takes one query block: up to ``64 // G`` queries of one sequence, with the G heads that share a key/value head
as rows of the same tile. Keys are cut at fixed positions, into tiles and into segments of several tiles. Within a
segment softmax is online, tile after tile, from nothing; segments are joined one after the other
(``online_softmax.join``). A program either walks through all segments, or it is one of several that compute a segment
each, which a second kernel joins in the same order: the same operations on the same numbers. What a query does not see
adds exact zeros. So a query's bits depend on its own sequence and position, and on nothing else. The tile always has 64
rows, also for one query: then every product is computed by one and the same instruction (wgmma m64), and what a lone
query wastes is arithmetic that waits for memory anyway. Split keys: "flash decoding" (Dao et al. 2023); heads as rows:
as vLLM's Triton kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moestro.kernels.cuda.attention_plan import Work
from moestro.kernels.cuda.attention_tile import ROWS, AttentionTile, choose_splits
from moestro.kernels.cuda.join_segments import LOG2_E, first_seen, join_kernel, load_sinks
from moestro.kernels.cuda.online_softmax import finish, finite_base, join


@triton.jit(do_not_specialize=["num_blocks", "table_stride", "num_splits", "rows_kept"])
def attention_kernel(
    q_ptr,  # [T, >= Q, D], the first Q heads
    kv_ptr,  # [blocks, C, b, D]
    table_ptr,  # int32 [S, B]
    blocks_ptr,  # int32 [4, N], see ``Work``
    sinks_ptr,  # [Q] or None
    scale_ptr,  # fp32 [C] of a cache of e4m3, or None
    out_ptr,  # [T, Q, D]
    partial_ptr,  # fp32 [N, H, P, R, D] or None
    partial_ml_ptr,  # fp32 [N, H, P, 2, R] or None
    num_blocks,
    table_stride,
    num_splits,  # P; 1: every program walks through all segments
    rows_kept,  # R
    score_scale,  # with log2(e)
    Q_STRIDE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(blocks_ptr + block)
    first_token = tl.load(blocks_ptr + num_blocks + block).to(tl.int64)
    num_queries = tl.load(blocks_ptr + 2 * num_blocks + block)
    first_query = tl.load(blocks_ptr + 3 * num_blocks + block)

    row = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + row % GROUP
    query_M = row // GROUP
    d = tl.arange(0, BLOCK_D)
    out_ptr_MD = out_ptr + (first_token + query_M)[:, None] * (NUM_HEADS * HEAD_DIM) + head_M[:, None] * HEAD_DIM + d
    if num_queries == 0:
        # Padding: the row of its token is set to zero, which no later layer stumbles over.
        if split == 0:
            padding_MD = (query_M == 0)[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(out_ptr_MD, tl.zeros((BLOCK_M, BLOCK_D), out_ptr.dtype.element_ty), mask=padding_MD)
        return

    stop = first_query + num_queries
    begin = first_seen(first_query, WINDOW) // BLOCK_N * BLOCK_N
    if num_splits > 1:
        segment_start = (begin // SEGMENT + split) * SEGMENT
        begin = tl.maximum(begin, segment_start)
        stop = tl.minimum(stop, segment_start + SEGMENT)
        if begin >= stop:
            return

    # Rows beyond the last query repeat its position, so that every row sees a key.
    counts_MD = (query_M < num_queries)[:, None] & (d < HEAD_DIM)[None, :]
    position_M = first_query + tl.minimum(query_M, num_queries - 1)
    q_ptr_MD = q_ptr + (first_token + query_M)[:, None] * Q_STRIDE + head_M[:, None] * HEAD_DIM + d[None, :]
    q_MD = tl.load(q_ptr_MD, mask=counts_MD, other=0.0)
    k_scale, v_scale = score_scale, 1.0
    if scale_ptr is not None:
        k_scale = score_scale * tl.load(scale_ptr + kv_head)
        v_scale = tl.load(scale_ptr + NUM_KV_HEADS + kv_head)

    m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    all_m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    all_l_M = tl.zeros((BLOCK_M,), tl.float32)
    all_acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table_row_ptr = table_ptr + sequence.to(tl.int64) * table_stride
    for tile in range(begin, stop, BLOCK_N):
        if tile % SEGMENT == 0:
            all_m_M, all_l_M, all_acc_MD = join(all_m_M, all_l_M, all_acc_MD, m_M, l_M, acc_MD)
            m_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            l_M = tl.zeros((BLOCK_M,), tl.float32)
            acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        key_N = tile + tl.arange(0, BLOCK_N)
        is_key = key_N < stop
        page_N = tl.load(table_row_ptr + key_N // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        k_at_N = ((page_N * (2 * NUM_KV_HEADS) + kv_head) * BLOCK_SIZE + key_N % BLOCK_SIZE) * HEAD_DIM
        kv_ptr_ND = kv_ptr + k_at_N[:, None] + d[None, :]
        inside_ND = is_key[:, None] & (d < HEAD_DIM)[None, :]
        k_ND = tl.load(kv_ptr_ND, mask=inside_ND, other=0.0).to(q_MD.dtype)
        v_ND = tl.load(kv_ptr_ND + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=inside_ND, other=0.0).to(q_MD.dtype)

        scores_MN = tl.dot(q_MD, tl.trans(k_ND))
        sees_MN = key_N[None, :] <= position_M[:, None]
        if WINDOW > 0:
            sees_MN = sees_MN & (key_N[None, :] > position_M[:, None] - WINDOW)
        scores_MN = tl.where(sees_MN, scores_MN, float("-inf"))
        new_m_M = tl.maximum(m_M, tl.max(scores_MN, 1) * k_scale, propagate_nan=tl.PropagateNan.ALL)
        base_M = finite_base(new_m_M)
        p_MN = tl.exp2(tl.fma(scores_MN, k_scale, -base_M[:, None]))
        shrink_M = tl.exp2(m_M - base_M)
        l_M = tl.fma(l_M, shrink_M, tl.sum(p_MN, 1))
        acc_MD = tl.dot(p_MN.to(q_MD.dtype), v_ND, acc_MD * shrink_M[:, None])
        m_M = new_m_M
    all_m_M, all_l_M, all_acc_MD = join(all_m_M, all_l_M, all_acc_MD, m_M, l_M, acc_MD)

    if num_splits > 1:
        cell = (block.to(tl.int64) * NUM_KV_HEADS + kv_head) * num_splits + split
        kept_M = row < rows_kept
        kept_MD = kept_M[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(partial_ptr + (cell * rows_kept + row)[:, None] * HEAD_DIM + d[None, :], all_acc_MD, mask=kept_MD)
        tl.store(partial_ml_ptr + cell * 2 * rows_kept + row, all_m_M, mask=kept_M)
        tl.store(partial_ml_ptr + (cell * 2 + 1) * rows_kept + row, all_l_M, mask=kept_M)
    else:
        out_MD = finish(all_m_M, all_l_M, all_acc_MD, load_sinks(sinks_ptr, head_M), v_scale)
        tl.store(out_ptr_MD, out_MD.to(out_ptr.dtype.element_ty), mask=counts_MD)


def attend_(
    out_TQD: Tensor,
    q_TND: Tensor,
    kv_NCbD: Tensor,
    table_SB: Tensor,
    work: Work,
    tile: AttentionTile,
    *,
    window: int | None,
    scale: float,
    sinks_Q: Tensor | None = None,
    kv_scale_C: Tensor | None = None,
    num_splits: int | None = None,
) -> None:
    """out = softmax(q k^T * scale) v for the queries of ``work``, written to their rows of ``out_TQD``; ``q_TND`` holds
    the Q query heads first. Its definition: ``paged_attention.paged_attention_reference``. Scores, softmax and sums in
    fp32; weights are rounded to bf16 for the product with the values. ``sinks_Q`` is a logit per query head that joins
    the sum of weights; ``kv_scale_C`` goes with a cache of e4m3. ``num_splits`` overrules ``choose_splits``: None or 1,
    or at least ``work.segments``.
    """
    _, num_heads, head_dim = out_TQD.shape
    _, num_slabs, block_size, _ = kv_NCbD.shape
    num_kv_heads = num_slabs // 2
    group = num_heads // num_kv_heads
    num_blocks = work.blocks_4N.shape[1]
    rows = work.queries * group
    assert group * num_kv_heads == num_heads, (num_heads, num_kv_heads)
    assert rows <= ROWS, (work.queries, group)
    assert all(tensor.is_contiguous() for tensor in (q_TND, kv_NCbD, out_TQD))
    assert scale > 0, scale
    splits = choose_splits(num_blocks, num_kv_heads, work.segments, 4 * rows * (head_dim + 2))
    splits = splits if num_splits is None else num_splits
    assert splits == 1 or splits >= work.segments, (splits, work.segments)
    cells = num_blocks * num_kv_heads * splits * rows if splits > 1 else 0
    partial = out_TQD.new_empty(cells * head_dim, dtype=torch.float32)
    partial_ml = out_TQD.new_empty(cells * 2, dtype=torch.float32)
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "SEGMENT": tile.segment,
        "BLOCK_N": tile.keys,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    attention_kernel[(num_blocks, num_kv_heads, splits)](
        q_TND,
        kv_NCbD,
        table_SB,
        work.blocks_4N,
        sinks_Q,
        kv_scale_C,
        out_TQD,
        partial,
        partial_ml,
        num_blocks,
        table_SB.stride(0),
        splits,
        rows,
        scale * LOG2_E.value,
        Q_STRIDE=q_TND.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_M=ROWS,
        **shape,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if splits > 1:
        join_kernel[(num_blocks, num_kv_heads, rows)](
            work.blocks_4N,
            sinks_Q,
            kv_scale_C,
            out_TQD,
            partial,
            partial_ml,
            num_blocks,
            splits,
            rows,
            **shape,
            num_warps=1,
            enable_fp_fusion=False,
        )
