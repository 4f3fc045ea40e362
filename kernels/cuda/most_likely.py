"""The K most likely tokens of each row, in order, and their log probabilities.

Legend: R rows, V vocabulary, C chunks of a row, B tokens of a chunk, K tokens.

Two launches: the first K of each chunk, then the first K of those. A logit and its id are one integer, so that no two
are equal and the order is ``workers/sampling/ordering``'s: the larger logit first, the smaller id among equals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 4096
_LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # behind every token


@triton.jit
def packed(logit_B, id_B):
    """int64 of which the smallest is the first of the order. Adding zero makes one of the two zeros."""
    bits_B = (logit_B + 0.0).to(tl.int32, bitcast=True)
    order_B = (bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)) ^ -1
    return (order_B.to(tl.int64) << 32) | id_B.to(tl.int64)


@triton.jit
def first_of_chunk_kernel(
    logits_ptr,
    packed_ptr,  # int64 [R, C, K]
    VOCABULARY: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, chunk = tl.program_id(0), tl.program_id(1)
    id_B = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = id_B < VOCABULARY
    logit_B = tl.load(logits_ptr + r.to(tl.int64) * VOCABULARY + id_B, mask=inside, other=float("-inf")).to(tl.float32)
    packed_B = tl.where(inside, packed(logit_B, id_B), _LAST)
    for k in range(K):
        first = tl.min(packed_B, 0)
        tl.store(packed_ptr + (r * NUM_CHUNKS + chunk) * K + k, first)
        packed_B = tl.where(packed_B == first, _LAST, packed_B)


@triton.jit
def first_of_row_kernel(
    logits_ptr,
    packed_ptr,
    normaliser_ptr,  # fp32 [R, 2]
    id_ptr,  # int64 [R, K]
    logprob_ptr,  # fp32 [R, K]
    VOCABULARY: tl.constexpr,
    NUM_PACKED: tl.constexpr,  # C * K
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two that holds NUM_PACKED
):
    r = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    packed_B = tl.load(packed_ptr + r * NUM_PACKED + at, mask=at < NUM_PACKED, other=_LAST)
    best, log_sum = tl.load(normaliser_ptr + 2 * r), tl.load(normaliser_ptr + 2 * r + 1)
    for k in range(K):
        first = tl.min(packed_B, 0)
        packed_B = tl.where(packed_B == first, _LAST, packed_B)
        token = first & 0xFFFFFFFF
        logit = tl.load(logits_ptr + r.to(tl.int64) * VOCABULARY + token).to(tl.float32)
        tl.store(id_ptr + r * K + k, token)
        tl.store(logprob_ptr + r * K + k, logit - best - log_sum)


def most_likely(logits_RV: Tensor, normaliser_R2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """id_RK (int64) and logprob_RK (fp32), K = min(k, V) and at least 1, of rows without NaN; ``normaliser_R2`` is
    ``sample_rows``'s. The order is that of ``workers/sampling/ordering.ranked``, the log probabilities are the log
    softmax of the raw logits."""
    num_rows, vocabulary = logits_RV.shape
    logits_RV = logits_RV.contiguous()
    k = min(k, vocabulary)
    num_chunks = triton.cdiv(vocabulary, _CHUNK)
    packed_RCK = torch.empty(num_rows, num_chunks, k, dtype=torch.int64, device=logits_RV.device)
    id_RK = torch.empty(num_rows, k, dtype=torch.int64, device=logits_RV.device)
    logprob_RK = torch.empty(num_rows, k, dtype=torch.float32, device=logits_RV.device)
    first_of_chunk_kernel[(num_rows, num_chunks)](
        logits_RV,
        packed_RCK,
        VOCABULARY=vocabulary,
        NUM_CHUNKS=num_chunks,
        K=k,
        BLOCK=_CHUNK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    first_of_row_kernel[(num_rows,)](
        logits_RV,
        packed_RCK,
        normaliser_R2,
        id_RK,
        logprob_RK,
        VOCABULARY=vocabulary,
        NUM_PACKED=num_chunks * k,
        K=k,
        BLOCK=triton.next_power_of_2(num_chunks * k),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return id_RK, logprob_RK
