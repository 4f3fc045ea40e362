"""Paged attention whose bits depend on the batch: what the engine would use if it did not promise otherwise.

Legend: T tokens, S sequences, N blocks of the cache, H key/value heads, G query heads per key/value head, Q query heads
(H * G), C slabs of a block (the H key heads, then the H value heads), b tokens per block, B blocks gathered, L keys, D
head width.

``scaled_dot_product_attention`` over gathered keys of any length; prompts read their keys from the step's own tokens.
It was the engine's own until the engine became invariant, and is kept to measure what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moestro.kernels.paged_attention import fresh_blocks, upload

_SMALLEST_BUCKET_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one query each and about as many keys, computed together."""

    rows_S: Tensor | None  # their token rows; None: rows 0 .. num
    num: int
    tiles: Tensor  # 2 * S * H * B rows of the cache seen as tiles: keys, then values
    start: int  # of the gathered keys, those from start to stop are used
    stop: int
    mask_S11L: Tensor | None  # additive


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence's run of queries."""

    start: int
    stop: int
    tiles: Tensor | None  # None: every key is in this step's own tokens
    num_keys: int
    mask_TL: Tensor | None  # additive; None: causal


@dataclass(frozen=True, slots=True)
class SdpaPlan:
    """One step of the layers of one cache group."""

    write_block_T: Tensor
    write_offset_T: Tensor
    fresh_blocks_F: Tensor | None  # blocks this step begins to write; None when there are none
    decodes: tuple[_Decodes, ...]
    spans: tuple[_Span, ...]


def plan_sdpa(
    query_start_S1: Sequence[int],
    context_len_S: Sequence[int],
    num_decodes: int,
    block_table_SB: Tensor,
    slot_T: Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> SdpaPlan:
    """Plans one step. Query at position p sees keys p - window + 1 .. p (all up to p without a window).

    Reads lengths on the host only, so it never waits for the device.
    """
    write_block_T = slot_T // block_size
    decodes = tuple(
        _plan_decodes(seqs, context_len_S, num_decodes, block_table_SB, num_kv_heads, block_size, window, dtype)
        for seqs in _buckets(context_len_S[:num_decodes], block_size, window)
    )
    spans = tuple(
        _plan_span(
            query_start_S1[s],
            query_start_S1[s + 1],
            context_len_S[s],
            block_table_SB[s],
            num_kv_heads,
            block_size,
            window,
            dtype,
        )
        for s in range(num_decodes, len(context_len_S))
    )
    fresh_F = fresh_blocks(query_start_S1, context_len_S, block_table_SB, block_size)
    return SdpaPlan(write_block_T, slot_T - write_block_T * block_size, fresh_F, decodes, spans)


def _buckets(context_len_S: Sequence[int], block_size: int, window: int | None) -> list[list[int]]:
    """Sequences grouped by the power of two above their number of blocks: at most half of a gather is padding."""
    buckets: dict[int, list[int]] = {}
    for s, length in enumerate(context_len_S):
        blocks = -(-min(length, window or length) // block_size)
        buckets.setdefault((max(blocks, _SMALLEST_BUCKET_BLOCKS) - 1).bit_length(), []).append(s)
    return list(buckets.values())


def _tiles(blocks_SB: Tensor, num_kv_heads: int) -> Tensor:
    """Rows of the cache seen as (N * C) tiles, ordered [keys or values, sequence, head, block], flat."""
    heads_H1 = torch.arange(num_kv_heads, device=blocks_SB.device).view(-1, 1)
    keys_SHB = blocks_SB.to(torch.int64).unsqueeze(1) * (2 * num_kv_heads) + heads_H1
    return torch.stack((keys_SHB, keys_SHB + num_kv_heads)).view(-1)


def _first_key(first_query: int, window: int | None) -> int:
    return 0 if window is None else max(0, first_query - window + 1)


def _plan_decodes(
    seqs: list[int],
    context_len_S: Sequence[int],
    num_decodes: int,
    block_table_SB: Tensor,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> _Decodes:
    device = block_table_SB.device
    lengths = [context_len_S[s] for s in seqs]
    firsts = [_first_key(length - 1, window) for length in lengths]
    first_blocks = [first // block_size for first in firsts]
    num_blocks = max(-(-length // block_size) - block for length, block in zip(lengths, first_blocks, strict=True))
    if len(seqs) == num_decodes:
        rows_S, table_SB = None, block_table_SB[:num_decodes]
    else:
        rows_S = upload(seqs, device)
        table_SB = block_table_SB.index_select(0, rows_S)
    if any(first_blocks):
        columns_SB = upload(first_blocks, device).unsqueeze(1) + torch.arange(num_blocks, device=device)
        table_SB = table_SB.gather(1, columns_SB.clamp_(max=table_SB.shape[1] - 1))
    else:
        table_SB = table_SB[:, :num_blocks]
    # Keys relative to the first gathered one; equal bounds need no mask, only a slice.
    starts = [first - block * block_size for first, block in zip(firsts, first_blocks, strict=True)]
    stops = [length - block * block_size for length, block in zip(lengths, first_blocks, strict=True)]
    start, stop, mask_S11L = min(starts), max(stops), None
    if max(starts) != start or min(stops) != stop:
        key_L = torch.arange(start, stop, device=device)
        bounds_2S1 = upload([*starts, *stops], device).view(2, -1, 1)
        seen_SL = (key_L >= bounds_2S1[0]) & (key_L < bounds_2S1[1])
        mask_S11L = _additive(seen_SL, dtype)[:, None, None, :]
    return _Decodes(rows_S, len(seqs), _tiles(table_SB, num_kv_heads), start, stop, mask_S11L)


def _plan_span(
    start: int,
    stop: int,
    context_len: int,
    block_table_B: Tensor,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> _Span:
    num_queries = stop - start
    if num_queries == context_len and (window is None or window >= context_len):
        return _Span(start, stop, None, context_len, None)
    device = block_table_B.device
    first_query = context_len - num_queries
    first_block = _first_key(first_query, window) // block_size
    first_key = first_block * block_size
    tiles = _tiles(block_table_B[first_block : -(-context_len // block_size)].unsqueeze(0), num_kv_heads)
    query_T1 = torch.arange(first_query, context_len, device=device).unsqueeze(1)
    key_L = torch.arange(first_key, context_len, device=device)
    seen_TL = key_L <= query_T1
    if window is not None:
        seen_TL &= key_L > query_T1 - window
    return _Span(start, stop, tiles, context_len - first_key, _additive(seen_TL, dtype))


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def sdpa_attention(q_TQD: Tensor, kv_TCD: Tensor, kv_NCbD: Tensor, plan: SdpaPlan, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each span over its sequence's keys; out_TQD.

    ``kv_TCD`` are this step's own keys and values, already written to the cache by ``write_kv_``.
    """
    num_tokens, num_heads, width = q_TQD.shape
    num_slabs, block_size = kv_NCbD.shape[1], kv_NCbD.shape[2]
    num_kv_heads = num_slabs // 2
    tiles = kv_NCbD.view(-1, block_size * width)
    out_TQD = torch.empty_like(q_TQD, memory_format=torch.contiguous_format)
    for group in plan.decodes:
        q_SQD = q_TQD[: group.num] if group.rows_S is None else q_TQD.index_select(0, group.rows_S)
        kv_2SHLD = tiles.index_select(0, group.tiles).view(2, group.num, num_kv_heads, -1, width)
        kv_2SHLD = kv_2SHLD[:, :, :, group.start : group.stop]
        # The G query heads of a key/value head are G rows of one product: nothing is repeated.
        q_SHGD = q_SQD.reshape(group.num, num_kv_heads, -1, width)
        out_SHGD = scaled_dot_product_attention(
            q_SHGD, kv_2SHLD[0], kv_2SHLD[1], attn_mask=group.mask_S11L, scale=scale
        )
        out_SQD = out_SHGD.reshape(group.num, num_heads, width)
        if group.num == num_tokens:
            return out_SQD
        if group.rows_S is None:
            out_TQD[: group.num] = out_SQD
        else:
            out_TQD.index_copy_(0, group.rows_S, out_SQD)
    for span in plan.spans:
        if span.tiles is None:
            kv_CLD = kv_TCD[span.start : span.stop].transpose(0, 1)
        else:
            kv_CLD = tiles.index_select(0, span.tiles).view(num_slabs, -1, width)[:, : span.num_keys]
        q_1QTD = q_TQD[span.start : span.stop].transpose(0, 1).unsqueeze(0)
        out_1QTD = scaled_dot_product_attention(
            q_1QTD,
            kv_CLD[:num_kv_heads].unsqueeze(0),
            kv_CLD[num_kv_heads:].unsqueeze(0),
            attn_mask=span.mask_TL,
            is_causal=span.mask_TL is None,
            scale=scale,
            enable_gqa=num_heads != num_kv_heads,
        )
        out_TQD[span.start : span.stop] = out_1QTD[0].transpose(0, 1)
    return out_TQD
