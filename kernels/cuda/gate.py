"""The gate in one launch: scores, choice, weights and counts.

Legend: T tokens, E experts, K experts per token, G groups of n experts (a gate without groups has one).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moestro.kernels.gate import GateSpec, Score


@triton.jit
def _ordered(score):
    """int64 in the order of fp32 scores, zeros equal, NaN above all."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, ordered).to(tl.int64)


@triton.jit
def _key(score, id, most: tl.constexpr):
    """No two are equal: among equal scores the smaller id is the larger key."""
    return _ordered(score) * most + (most - 1 - id)


@triton.jit
def gate_kernel(
    logits_ptr,  # [T, E]
    bias_ptr,  # fp32 [E] or None
    ids_ptr,  # int64 [T, K]
    weights_ptr,  # fp32 [T, K]
    counts_ptr,  # int64 [E], to be added to; or None
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALING: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,  # as many as GROUPS: all
    PAD_G: tl.constexpr,
    PAD_N: tl.constexpr,
    PAD_K: tl.constexpr,
):
    """One token."""
    SIZE: tl.constexpr = E // GROUPS
    MOST: tl.constexpr = PAD_G * PAD_N
    NONE: tl.constexpr = -(2**62)  # below every key
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, PAD_G)
    n = tl.arange(0, PAD_N)
    id_Gn = g[:, None] * SIZE + n[None, :]
    real_Gn = (g[:, None] < GROUPS) & (n[None, :] < SIZE)
    logit_Gn = tl.load(logits_ptr + token * E + id_Gn, mask=real_Gn, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score_Gn = 1 / (1 + tl.exp(-logit_Gn))
    else:
        # tl.max skips a NaN, which the sum then brings back.
        power_Gn = tl.exp(logit_Gn - tl.max(tl.max(logit_Gn, 1), 0))
        score_Gn = power_Gn / tl.sum(tl.sum(tl.where(real_Gn, power_Gn, 0.0), 1), 0)
    choice_Gn = score_Gn
    if bias_ptr is not None:
        choice_Gn += tl.load(bias_ptr + id_Gn, mask=real_Gn, other=0.0)
    key_Gn = tl.where(real_Gn, _key(choice_Gn, id_Gn, MOST), NONE)

    if KEPT_GROUPS < GROUPS:
        best_G = tl.max(key_Gn, 1)
        second_Gn = tl.where(key_Gn == best_G[:, None], NONE, key_Gn)
        second_G = tl.max(second_Gn, 1)
        # Only one of a row: a sum of one number and zeros.
        best_G = tl.sum(tl.where(key_Gn == best_G[:, None], choice_Gn, 0.0), 1)
        second_G = tl.sum(tl.where(second_Gn == second_G[:, None], choice_Gn, 0.0), 1)
        group_key_G = tl.where(g < GROUPS, _key(best_G + second_G, g, MOST), NONE)
        left_G = group_key_G
        least = tl.max(left_G, 0)
        for _ in tl.static_range(1, KEPT_GROUPS):
            left_G = tl.where(left_G == least, NONE, left_G)
            least = tl.max(left_G, 0)
        key_Gn = tl.where(group_key_G[:, None] < least, NONE, key_Gn)

    k = tl.arange(0, PAD_K)
    id_K = tl.zeros((PAD_K,), tl.int64)
    weight_K = tl.zeros((PAD_K,), tl.float32)
    total = 0.0
    for place in tl.static_range(K):
        best = tl.max(tl.max(key_Gn, 1), 0)
        chosen_Gn = key_Gn == best
        weight = tl.sum(tl.sum(tl.where(chosen_Gn, score_Gn, 0.0), 1), 0)
        id = tl.max(tl.max(tl.where(chosen_Gn, id_Gn, 0), 1), 0)
        id_K = tl.where(k == place, id, id_K)
        weight_K = tl.where(k == place, weight, weight_K)
        key_Gn = tl.where(chosen_Gn, NONE, key_Gn)
        total += weight
    if RENORMALIZE:
        weight_K = weight_K / (total + 1e-20)
    if SCALING != 1.0:
        weight_K *= SCALING
    tl.store(ids_ptr + token * K + k, id_K, mask=k < K)
    tl.store(weights_ptr + token * K + k, weight_K, mask=k < K)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr + id_K, tl.full((PAD_K,), 1, tl.int64), mask=k < K, sem="relaxed")


def route(
    logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec, counts_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ids_TK (int64) and weights_TK (fp32); reference: ``gate.route``, whose choice it makes where scores differ by
    more than rounding: exponentials and sums are the device's own. ``counts_E`` (int64), where given, is raised by
    how many tokens chose each expert. Up to 512 experts."""
    num_tokens, num_experts = logits_TE.shape
    ids_TK = torch.empty(num_tokens, spec.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, spec.top_k, dtype=torch.float32, device=logits_TE.device)
    if num_tokens == 0:
        return ids_TK, weights_TK
    groups, kept = (1, 1) if spec.groups is None else (spec.groups.num_groups, spec.groups.top_k)
    gate_kernel[(num_tokens,)](
        logits_TE.contiguous(),
        bias_E,
        ids_TK,
        weights_TK,
        counts_E,
        E=num_experts,
        K=spec.top_k,
        SIGMOID=spec.score is Score.SIGMOID,
        RENORMALIZE=spec.renormalize,
        SCALING=spec.scaling,
        GROUPS=groups,
        KEPT_GROUPS=kept,
        PAD_G=triton.next_power_of_2(groups),
        PAD_N=triton.next_power_of_2(num_experts // groups),
        PAD_K=triton.next_power_of_2(spec.top_k),
        num_warps=1 if num_experts <= 128 else 4,
        enable_fp_fusion=False,
    )
    return ids_TK, weights_TK
