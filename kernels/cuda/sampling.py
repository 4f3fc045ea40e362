"""From logits to tokens and log probabilities, on the device, without waiting for it.

Legend: R rows, V vocabulary, C chunks of a row, B tokens of a chunk, P pairs of them, K the K most likely tokens.

Rows are plainly greedy (temperature 0) or drawn from their tempered softmax (Gumbel-max); what else a request may ask
for stays with torch (``workers/sampling``). Three launches: the best of each chunk of a row; where a row has a
temperature, the best of each chunk after noise was added; the row's token. The logits are read twice, the second time
from the L2 cache as a rule. A chunk is cut and chunks are joined by the vocabulary's size alone.

The noise is that of ``workers/sampling/noise.py``, whose keys the caller makes: SplitMix64 (Steele, Lea, Flood 2014) as
a counter. Uniforms are the same bits as there; the two logarithms are CUDA's own, as torch's are on a GPU, so that a
row draws the same token in a captured step and in another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_CHUNK = 4096
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ABSENT = tl.constexpr(0x7FFFFFFF)  # an id beyond every vocabulary
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_UNIFORM_SCALE = tl.constexpr(2.0**-31 * (1.0 - 2.0**-24))
_LEAST_TEMPERATURE = tl.constexpr(1.1754943508222875e-38)  # smaller ones would divide zero by zero
_NAN, _PLUS_INF, _ALL_MINUS_INF = tl.constexpr(-1), tl.constexpr(-2), tl.constexpr(-3)


@triton.jit
def log1p_of_negative(u_B):
    """log1p(-u). On a GPU by CUDA's function, which torch calls too; the interpreter, which has none, takes
    log(y) * -u / (y - 1) with y = 1 - u as it is rounded (Kahan)."""
    if _INTERPRETED:
        y_B = 1.0 - u_B
        step_B = tl.where(y_B == 1.0, 1.0, y_B - 1.0)
        log1p_B = tl.where(y_B == 1.0, -u_B, tl.log(y_B) * (-u_B / step_B))
    else:
        log1p_B = libdevice.log1p(-u_B)
    return log1p_B


@triton.jit
def gumbel_of_chunk(key, first_id, BLOCK: tl.constexpr):
    """Noise of ``BLOCK`` ids from ``first_id`` (even) on. One hash serves two ids."""
    pair_P = (first_id // 2 + tl.arange(0, BLOCK // 2) + 1).to(tl.uint64)
    hash_P = key.to(tl.uint64, bitcast=True) + pair_P * _GAMMA
    hash_P = (hash_P ^ (hash_P >> 30)) * _MIX_1
    hash_P = (hash_P ^ (hash_P >> 27)) * _MIX_2
    hash_P = hash_P ^ (hash_P >> 31)
    word_B = tl.interleave(hash_P & 0x7FFFFFFF, (hash_P >> 32) & 0x7FFFFFFF).to(tl.int32)
    uniform_B = (word_B.to(tl.float32) + 0.5) * _UNIFORM_SCALE
    return -tl.log(-log1p_of_negative(uniform_B))


@triton.jit
def best_of(value_B, id_B):
    """The largest value and the smallest id that has it; NaN and an id of none where there is a NaN."""
    best = tl.max(value_B, 0)
    best = tl.where(tl.max((value_B != value_B).to(tl.int32), 0) > 0, float("nan"), best)
    return best, tl.min(tl.where(value_B == best, id_B, _ABSENT), 0)


@triton.jit
def chunk_kernel(
    logits_ptr,  # [R, V]
    best_ptr,  # fp32 [R, C]
    id_ptr,  # int32 [R, C]
    sum_ptr,  # fp32 [R, C]; of exp(logit - best of the chunk)
    VOCABULARY: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, chunk = tl.program_id(0), tl.program_id(1)
    id_B = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = id_B < VOCABULARY
    logit_B = tl.load(logits_ptr + r.to(tl.int64) * VOCABULARY + id_B, mask=inside, other=float("-inf")).to(tl.float32)
    best, best_id = best_of(logit_B, id_B)
    # A chunk of nothing but -inf has a sum of 0.
    base = tl.where(best == float("-inf"), 0.0, best)
    cell = r * NUM_CHUNKS + chunk
    tl.store(best_ptr + cell, best)
    tl.store(id_ptr + cell, best_id)
    tl.store(sum_ptr + cell, tl.sum(tl.exp(logit_B - base), 0))


@triton.jit
def draw_kernel(
    logits_ptr,
    best_ptr,
    temperature_ptr,  # fp32 [R]; 0: greedy
    key_ptr,  # int64 [R]
    score_ptr,  # fp32 [R, C]
    drawn_ptr,  # int32 [R, C]
    VOCABULARY: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two that holds NUM_CHUNKS
    BLOCK: tl.constexpr,
):
    r, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperature_ptr + r)
    if temperature <= 0.0:
        return
    c = tl.arange(0, CHUNKS)
    bests_C = tl.load(best_ptr + r * NUM_CHUNKS + c, mask=c < NUM_CHUNKS, other=float("-inf"))
    best, _ = best_of(bests_C, c)
    id_B = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = id_B < VOCABULARY
    logit_B = tl.load(logits_ptr + r.to(tl.int64) * VOCABULARY + id_B, mask=inside, other=float("-inf")).to(tl.float32)
    tempered_B = tl.div_rn(logit_B - best, tl.zeros_like(logit_B) + tl.maximum(temperature, _LEAST_TEMPERATURE))
    score_B = gumbel_of_chunk(tl.load(key_ptr + r), chunk * BLOCK, BLOCK) + tempered_B
    score, drawn = best_of(score_B, id_B)
    tl.store(score_ptr + r * NUM_CHUNKS + chunk, score)
    tl.store(drawn_ptr + r * NUM_CHUNKS + chunk, drawn)


@triton.jit
def token_kernel(
    logits_ptr,
    best_ptr,
    id_ptr,
    sum_ptr,
    temperature_ptr,
    score_ptr,
    drawn_ptr,
    code_ptr,  # int64 [R]
    logprob_ptr,  # fp32 [R]
    normaliser_ptr,  # fp32 [R, 2]: the largest logit, and the log of the sum of exp(logit - largest)
    VOCABULARY: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    r = tl.program_id(0)
    c = tl.arange(0, CHUNKS)
    there = c < NUM_CHUNKS
    cell_C = r * NUM_CHUNKS + c
    best_C = tl.load(best_ptr + cell_C, mask=there, other=float("-inf"))
    best, token = best_of(best_C, tl.load(id_ptr + cell_C, mask=there, other=_ABSENT))
    if tl.load(temperature_ptr + r) > 0.0:
        score_C = tl.load(score_ptr + cell_C, mask=there, other=float("-inf"))
        _, token = best_of(score_C, tl.load(drawn_ptr + cell_C, mask=there, other=_ABSENT))
    is_finite = (best == best) & (tl.abs(best) != float("inf"))
    error = tl.where(best > 0.0, _PLUS_INF, _ALL_MINUS_INF)
    error = tl.where(best == best, error, _NAN)
    code = tl.where(is_finite, token, error)
    # Where the best is not finite neither is what follows from it, as log_softmax has it.
    log_sum = tl.log(tl.sum(tl.load(sum_ptr + cell_C, mask=there, other=0.0) * tl.exp(best_C - best), 0))
    logit = tl.load(logits_ptr + r.to(tl.int64) * VOCABULARY + tl.maximum(code, 0)).to(tl.float32)
    tl.store(code_ptr + r, code.to(tl.int64))
    tl.store(logprob_ptr + r, logit - best - log_sum)
    tl.store(normaliser_ptr + 2 * r, best)
    tl.store(normaliser_ptr + 2 * r + 1, log_sum)


def sample_rows(logits_RV: Tensor, temperature_R: Tensor, key_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """code_R (int64), logprob_R (fp32) and normaliser_R2 (fp32), which ``most_likely`` takes. No synchronisation, so it
    can be part of a captured step.

    A code is the row's token, or says what is wrong with its logits (bf16 or fp32): -1 NaN, -2 +Inf, -3 nothing but
    -Inf. Where ``temperature_R`` (fp32) is 0 the token is the largest logit's, of equal ones the smallest id's; where
    it is positive it is drawn with the noise of ``key_R`` (int64, ``noise.row_keys``): the token that
    ``workers/sampling/sampler.sample`` draws for a row without edits, filters and min_p. ``logprob_R`` is the log
    softmax of the raw logits at that token.
    """
    num_rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    logits_RV = logits_RV.contiguous()
    num_chunks = triton.cdiv(vocabulary, _CHUNK)
    # Each an allocation of its own: a kernel is compiled anew for a pointer that is not a multiple of 16 bytes.
    best_RC, sum_RC, score_RC = (
        torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device) for _ in range(3)
    )
    id_RC, drawn_RC = (torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device) for _ in range(2))
    code_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprob_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    normaliser_R2 = torch.empty(num_rows, 2, dtype=torch.float32, device=device)
    shape = {"VOCABULARY": vocabulary, "NUM_CHUNKS": num_chunks}
    chunks, grid = triton.next_power_of_2(num_chunks), (num_rows, num_chunks)
    chunk_kernel[grid](
        logits_RV, best_RC, id_RC, sum_RC, **shape, BLOCK=_CHUNK, num_warps=8, enable_fp_fusion=False
    )  # fmt: skip
    draw_kernel[grid](
        logits_RV,
        best_RC,
        temperature_R,
        key_R,
        score_RC,
        drawn_RC,
        **shape,
        CHUNKS=chunks,
        BLOCK=_CHUNK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    token_kernel[(num_rows,)](
        logits_RV,
        best_RC,
        id_RC,
        sum_RC,
        temperature_R,
        score_RC,
        drawn_RC,
        code_R,
        logprob_R,
        normaliser_R2,
        **shape,
        CHUNKS=chunks,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return code_R, logprob_R, normaliser_R2
