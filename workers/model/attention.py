"""Grouped-query attention over the paged cache.

Legend: T tokens, M model width, N heads of queries, keys and values together, Q query heads, H key/value heads, D head
width, C slabs of the cache (2 H); all of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.backend import AttentionShape, HeadNorm, PagedAttention
from moestro.kernels.linear import Linear
from moestro.router.parallel import TensorParallel
from moestro.workers.kv_cache import LayerCache
from moestro.workers.model.sharding import HeadShard, shard_heads
from moestro.workers.model.weights import WeightSource, read, read_linear
from moestro.workers.model_config import AttentionSpec, QKNorm

Edit = Callable[[Tensor], None]
"""Changes the projected heads, qkv_TND, in place."""


@dataclass(frozen=True, slots=True)
class FullNorm:
    """Over all query heads at once and over all key heads at once, those of other ranks included."""

    weight_ND: Tensor  # fp32; one row per query head, then per key head
    num_heads: int
    totals_2: Tensor  # fp32; numbers that are normalised together: all queries' and all keys'
    shares_2: Tensor  # fp32; 1 / ranks that hold the same heads
    tp: TensorParallel
    eps: float

    def edit_(self, qkv_TND: Tensor) -> None:
        qk_TND = qkv_TND[:, : self.weight_ND.shape[0]]
        wide_TND = qk_TND.float()
        squares_TN = wide_TND.square().sum(-1)
        queries_T, keys_T = squares_TN[:, : self.num_heads].sum(1), squares_TN[:, self.num_heads :].sum(1)
        sums_T2 = self.tp.sum(torch.stack((queries_T, keys_T), 1) * self.shares_2)
        inverse_T2 = torch.rsqrt(sums_T2 / self.totals_2 + self.eps).unsqueeze(-1)
        torch.mul(wide_TND[:, : self.num_heads], inverse_T2[:, :1], out=wide_TND[:, : self.num_heads])
        torch.mul(wide_TND[:, self.num_heads :], inverse_T2[:, 1:], out=wide_TND[:, self.num_heads :])
        qk_TND.copy_(wide_TND.to(qk_TND.dtype) * self.weight_ND)


def clip_(qkv_TND: Tensor, limit: float) -> None:
    """OLMo's clip, after the norm."""
    qkv_TND.clamp_(-limit, limit)


@dataclass(frozen=True, slots=True)
class Attention:
    """Projections and what stands between them; the kernel brings norm, rope, cache and product."""

    spec: AttentionSpec
    heads: HeadShard
    qkv: Linear  # query heads, key heads, value heads
    edits: tuple[Edit, ...]
    kernel: PagedAttention[Any]
    out: Linear
    tp: TensorParallel

    def forward(self, x_TM: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, plan: Any, kv_NCbD: Tensor) -> Tensor:
        """y_TM; the new tokens' keys and values are left in the cache. ``plan`` is the kernel's, made once a step for
        this block and all others of its group."""
        num_tokens = x_TM.shape[0]
        qkv_TND = self.qkv.apply(x_TM).view(num_tokens, -1, self.spec.head_dim)
        for edit in self.edits:
            edit(qkv_TND)
        out_TQD = self.kernel.apply(qkv_TND, cos_T1D, sin_T1D, kv_NCbD, plan)
        return self.tp.sum(self.out.apply(out_TQD.view(num_tokens, -1)))

    def cache(self, group: int) -> LayerCache:
        """What this block stores."""
        return LayerCache(group, 2 * self.heads.num_kv_heads, self.spec.head_dim)


def build_attention(
    spec: AttentionSpec,
    rotary_dim: int,
    hidden_size: int,
    eps: float,
    prefix: str,
    source: WeightSource,
    tp: TensorParallel,
) -> Attention:
    """Reads this rank's heads."""
    heads, dim = shard_heads(spec, tp.rank, tp.size), spec.head_dim
    parts = (
        ("q", heads.first_head, heads.num_heads),
        ("k", heads.first_kv_head, heads.num_kv_heads),
        ("v", heads.first_kv_head, heads.num_kv_heads),
    )
    num_rows = sum(num for _, _, num in parts) * dim
    weight_NM = source.backend.empty_weight(num_rows, hidden_size, source.dtype, source.device)
    bias_N = torch.empty(num_rows, dtype=source.dtype, device=source.device) if spec.qkv_bias else None
    row = 0
    for part, first, num in parts:
        source.read_(weight_NM[row : row + num * dim], f"{prefix}{part}_proj.weight", row=first * dim)
        if bias_N is not None:
            source.read_(bias_N[row : row + num * dim], f"{prefix}{part}_proj.bias", row=first * dim)
        row += num * dim
    qkv = source.backend.make_linear(weight_NM, bias_N)
    del weight_NM
    # Row-parallel: the ranks' results are added, so one of them brings the bias.
    out_bias = read(source, prefix + "o_proj.bias", hidden_size) if spec.out_bias and tp.rank == 0 else None
    width, first_column = heads.num_heads * dim, heads.first_head * dim
    out = read_linear(source, prefix + "o_proj.weight", hidden_size, width, column=first_column, bias_O=out_bias)
    shape = AttentionShape(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=dim,
        rotary_dim=rotary_dim,
        scale=spec.scale,
        window=spec.window,
        dtype=source.dtype,
        device=source.device,
    )
    edits, norm = _before_rotation(spec, _build_norm(spec, heads, eps, prefix, source, tp))
    return Attention(spec, heads, qkv, edits, source.backend.make_attention(shape, norm), out, tp)


def _before_rotation(spec: AttentionSpec, norm: HeadNorm | FullNorm | None) -> tuple[tuple[Edit, ...], HeadNorm | None]:
    """What is done to the projected heads beforehand, and the norm that is left to the kernel."""
    clip: tuple[Edit, ...] = () if spec.clip_qkv is None else (partial(clip_, limit=spec.clip_qkv),)
    if isinstance(norm, FullNorm):
        return (norm.edit_, *clip), None
    assert not clip, "the table of architectures clips only what is normalised as a whole"
    return (), norm


def _build_norm(
    spec: AttentionSpec, heads: HeadShard, eps: float, prefix: str, source: WeightSource, tp: TensorParallel
) -> HeadNorm | FullNorm | None:
    dim = spec.head_dim
    match spec.qk_norm:
        case QKNorm.NONE:
            return None
        case QKNorm.HEAD:
            q_1D, k_1D = (read(source, f"{prefix}{part}_norm.weight", dim).float().unsqueeze(0) for part in "qk")
            # Not torch.cat: on the meta device, where a model is measured before it is loaded, that imports torch's
            # compiler, which costs a rank a second and 150 MB.
            weight_HD = q_1D.new_empty(heads.num_heads + heads.num_kv_heads, dim)
            weight_HD[: heads.num_heads] = q_1D
            weight_HD[heads.num_heads :] = k_1D
            return HeadNorm(weight_HD, eps)
        case QKNorm.FULL:
            q_N = read(source, prefix + "q_norm.weight", heads.num_heads * dim, row=heads.first_head * dim)
            k_N = read(source, prefix + "k_norm.weight", heads.num_kv_heads * dim, row=heads.first_kv_head * dim)
            return FullNorm(
                torch.cat((q_N, k_N)).float().view(-1, dim),
                heads.num_heads,
                torch.tensor(
                    [spec.num_heads * dim, spec.num_kv_heads * dim], dtype=torch.float32, device=source.device
                ),
                torch.tensor([1.0, 1.0 / heads.kv_copies], dtype=torch.float32, device=source.device),
                tp,
                eps,
            )
