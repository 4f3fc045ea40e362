"""Grouped-query attention over the paged cache.

Legend: T tokens, M model width, Q query heads, H key/value heads, D head width, C slabs of the cache (2 H); all of this
rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.kernels.attention_tiles import AttentionTiles, attention_tiles
from moestro.kernels.linear import Linear, empty_weight, make_linear
from moestro.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention, write_kv_
from moestro.kernels.rms_norm import rms_norm
from moestro.kernels.rotary import rotate
from moestro.router.parallel import TensorParallel
from moestro.workers.batch import Batch, CacheTables
from moestro.workers.kv_cache import LayerCache
from moestro.workers.model.sharding import HeadShard, shard_heads
from moestro.workers.model.weights import WeightSource, read, read_linear
from moestro.workers.model_config import AttentionSpec, QKNorm


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Each head on its own."""

    weight_ND: Tensor  # fp32; one row per query head, then per key head
    eps: float

    def apply(self, qk_TND: Tensor) -> Tensor:
        return rms_norm(qk_TND, None, self.eps) * self.weight_ND


@dataclass(frozen=True, slots=True)
class FullNorm:
    """Over all query heads at once and over all key heads at once, those of other ranks included."""

    weight_ND: Tensor  # fp32
    num_heads: int
    totals_2: Tensor  # fp32; numbers that are normalised together: all queries' and all keys'
    shares_2: Tensor  # fp32; 1 / ranks that hold the same heads
    tp: TensorParallel
    eps: float

    def apply(self, qk_TND: Tensor) -> Tensor:
        wide_TND = qk_TND.float()
        squares_TN = wide_TND.square().sum(-1)
        queries_T, keys_T = squares_TN[:, : self.num_heads].sum(1), squares_TN[:, self.num_heads :].sum(1)
        sums_T2 = self.tp.sum(torch.stack((queries_T, keys_T), 1) * self.shares_2)
        inverse_T2 = torch.rsqrt(sums_T2 / self.totals_2 + self.eps).unsqueeze(-1)
        normed_TND = torch.empty_like(wide_TND)
        torch.mul(wide_TND[:, : self.num_heads], inverse_T2[:, :1], out=normed_TND[:, : self.num_heads])
        torch.mul(wide_TND[:, self.num_heads :], inverse_T2[:, 1:], out=normed_TND[:, self.num_heads :])
        return normed_TND.to(qk_TND.dtype) * self.weight_ND


@dataclass(frozen=True, slots=True)
class Attention:
    """Projections, norms, rope, cache and product of one layer."""

    spec: AttentionSpec
    heads: HeadShard
    qkv: Linear  # query heads, key heads, value heads
    out: Linear
    norm: HeadNorm | FullNorm | None
    tp: TensorParallel
    tiles: AttentionTiles

    def forward(self, x_TM: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, plan: AttentionPlan, kv_NCbD: Tensor) -> Tensor:
        """y_TM; the new tokens' keys and values are left in the cache."""
        num_tokens, num_heads = x_TM.shape[0], self.heads.num_heads
        num_rotated = num_heads + self.heads.num_kv_heads
        qkv_TND = self.qkv.apply(x_TM).view(num_tokens, -1, self.spec.head_dim)
        qk_TND = qkv_TND[:, :num_rotated]
        normed_TND = qk_TND if self.norm is None else self.norm.apply(qk_TND)
        if self.spec.clip_qkv is not None:
            normed_TND = normed_TND.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
            qkv_TND[:, num_rotated:].clamp_(-self.spec.clip_qkv, self.spec.clip_qkv)
        rotary_dim = cos_T1D.shape[-1]
        if rotary_dim < self.spec.head_dim:
            qk_TND[..., rotary_dim:].copy_(normed_TND[..., rotary_dim:])
        # Rotated in fp32 and rounded once, into the buffer from which queries are read and the cache is written.
        qk_TND[..., :rotary_dim].copy_(rotate(normed_TND[..., :rotary_dim], cos_T1D, sin_T1D))
        kv_TCD = qkv_TND[:, num_heads:]
        write_kv_(kv_NCbD, kv_TCD, plan)
        out_TQD = paged_attention(qkv_TND[:, :num_heads], kv_NCbD, plan, self.spec.scale)
        return self.tp.sum(self.out.apply(out_TQD.view(num_tokens, -1)))

    def plan(self, batch: Batch, tables: CacheTables, block_size: int) -> AttentionPlan:
        """What this step needs of this block and of all others of its group."""
        return plan_attention(
            batch.query_start_S1,
            batch.context_len_S,
            batch.num_decodes,
            tables.block_table_SB,
            tables.slot_T,
            num_kv_heads=self.heads.num_kv_heads,
            block_size=block_size,
            window=self.spec.window,
            tiles=self.tiles,
        )

    def cache(self, group: int) -> LayerCache:
        """What this block stores."""
        return LayerCache(group, 2 * self.heads.num_kv_heads, self.spec.head_dim)


def build_attention(
    spec: AttentionSpec, hidden_size: int, eps: float, prefix: str, source: WeightSource, tp: TensorParallel
) -> Attention:
    """Reads this rank's heads."""
    heads, dim = shard_heads(spec, tp.rank, tp.size), spec.head_dim
    parts = (
        ("q", heads.first_head, heads.num_heads),
        ("k", heads.first_kv_head, heads.num_kv_heads),
        ("v", heads.first_kv_head, heads.num_kv_heads),
    )
    num_rows = sum(num for _, _, num in parts) * dim
    weight_NM = empty_weight(num_rows, hidden_size, source.dtype, source.device)
    bias_N = torch.empty(num_rows, dtype=source.dtype, device=source.device) if spec.qkv_bias else None
    row = 0
    for part, first, num in parts:
        source.read_(weight_NM[row : row + num * dim], f"{prefix}{part}_proj.weight", row=first * dim)
        if bias_N is not None:
            source.read_(bias_N[row : row + num * dim], f"{prefix}{part}_proj.bias", row=first * dim)
        row += num * dim
    qkv = make_linear(weight_NM, bias_N)
    del weight_NM
    # Row-parallel: the ranks' results are added, so one of them brings the bias.
    out_bias = read(source, prefix + "o_proj.bias", hidden_size) if spec.out_bias and tp.rank == 0 else None
    width, first_column = heads.num_heads * dim, heads.first_head * dim
    out = read_linear(source, prefix + "o_proj.weight", hidden_size, width, column=first_column, bias_O=out_bias)
    tiles = attention_tiles(dim, heads.num_heads // heads.num_kv_heads, source.device)
    return Attention(spec, heads, qkv, out, _build_norm(spec, heads, eps, prefix, source, tp), tp, tiles)


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
