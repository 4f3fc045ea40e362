"""Attention over a paged cache, in plain torch.

Legend: T tokens, S sequences, N blocks of the cache, H key/value heads, G query heads per key/value head, Q query heads
(H * G), C slabs of a block (the H key heads, then the H value heads), b tokens per block, B blocks gathered, L keys, D
head width; n sequences computed together, t queries of each, R rows of a product (t * G and padding).

A layer's cache is ``kv_NCbD``: a block is one piece of memory and each head's tile in it another, so that one
``index_select`` of tiles yields keys and values ready for the product. What depends only on the step (which tiles,
which keys are masked) is an ``AttentionPlan``, built once a step for all layers that share a block table.

A query gets the same bits however the tokens of its sequence were cut into spans and whatever is computed beside it:
weighted values are added up in chunks of keys at fixed positions, in order, in fp32; a key that is not seen weighs
exactly zero; and products are called only with numbers of rows and keys that agree (``attention_tiles``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from moestro.kernels.attention_tiles import AttentionTiles, scores

_SMALLEST_BUCKET_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class QueryRun:
    """t queries of each of n sequences; every sequence's keys from ``first_key`` to ``stop_key``, counted in what was
    gathered. Keys from ``mask_from`` on need the mask."""

    rows: slice | Tensor  # of the step's tokens, n * t of them
    per_sequence: int
    first_key: int
    stop_key: int
    mask_from: int
    mask_n1t1L: Tensor | None  # additive, fp32; None: all keys are seen


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Sequences with about as many keys, gathered together; either many with one query or one with many."""

    num_sequences: int
    tiles: Tensor  # 2 * n * H * B rows of the cache seen as tiles: keys, then values
    num_keys: int
    queries: tuple[QueryRun, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step of the layers of one cache group."""

    write_block_T: Tensor
    write_offset_T: Tensor
    fresh_blocks_F: Tensor | None  # blocks this step begins to write; None when there are none
    groups: tuple[SequenceGroup, ...]
    tiles: AttentionTiles


@dataclass(frozen=True, slots=True)
class _Cut:
    """Tokens of the step that are queries together: ``per_sequence`` of each sequence, from a position on."""

    rows: slice | Tensor
    first_query_n: Sequence[int]
    per_sequence: int


@dataclass(frozen=True, slots=True)
class _Planner:
    """What the groups of a step have in common."""

    context_len_S: Sequence[int]
    block_table_SB: Tensor
    num_kv_heads: int
    block_size: int
    window: int | None
    tiles: AttentionTiles

    def group(self, rows: slice | Tensor, lengths: Sequence[int], cuts: Sequence[_Cut]) -> SequenceGroup:
        """Sequences at ``rows`` of the block table, with contexts of ``lengths`` tokens."""
        begins = [self._first_key(query) for query in cuts[0].first_query_n]
        queries = tuple(self._queries(cut, begins) for cut in cuts)
        num_keys = queries[-1].stop_key
        return SequenceGroup(len(lengths), self._gathered(rows, lengths, begins, num_keys), num_keys, queries)

    def _first_key(self, query: int) -> int:
        """Where the keys of a query begin: at a chunk, and at a block."""
        if self.window is None:
            return 0
        unit = lcm(self.tiles.chunk, self.block_size)
        return max(0, query - self.window + 1) // unit * unit

    def _queries(self, cut: _Cut, begins: Sequence[int]) -> QueryRun:
        """Keys and queries are counted from the first key that is gathered."""
        first_n = [query - begin for query, begin in zip(cut.first_query_n, begins, strict=True)]
        first, last = min(first_n), max(first_n) + cut.per_sequence - 1
        chunk, grain = self.tiles.chunk, self.tiles.grain
        first_key, stop_key = 0, -(-(last + 1) // grain) * grain
        mask_from = first + 1
        if self.window is not None:
            first_key = max(0, first - self.window + 1) // chunk * chunk
            if last - self.window + 1 > first_key:
                mask_from = first_key
        mask = self._mask(first_n, cut.per_sequence, mask_from, stop_key) if mask_from < stop_key else None
        return QueryRun(cut.rows, cut.per_sequence, first_key, stop_key, mask_from, mask)

    def _mask(self, first_n: Sequence[int], num: int, first_key: int, stop_key: int) -> Tensor:
        device = self.block_table_SB.device
        query_nt1 = upload(first_n, device).view(-1, 1, 1)
        if num > 1:
            query_nt1 = query_nt1 + torch.arange(num, device=device).unsqueeze(1)
        return additive_mask(query_nt1, first_key, stop_key, self.window)

    def _gathered(self, rows: slice | Tensor, lengths: Sequence[int], begins: Sequence[int], num_keys: int) -> Tensor:
        device, size = self.block_table_SB.device, self.block_size
        bounds = [*(begin // size for begin in begins), *(-(-length // size) for length in lengths)]
        first_n1, stop_n1 = upload(bounds, device).view(2, -1, 1).unbind()
        return gathered_tiles(self.block_table_SB[rows], first_n1, stop_n1, -(-num_keys // size), self.num_kv_heads)


def additive_mask(query_nt1: Tensor, first_key: int, stop_key: int, window: int | None) -> Tensor:
    """mask_n1t1L, fp32: zero for the keys from ``first_key`` to ``stop_key`` that a query sees, else minus infinity."""
    key_L = torch.arange(first_key, stop_key, device=query_nt1.device)
    hidden_ntL = key_L > query_nt1
    if window is not None:
        hidden_ntL |= key_L <= query_nt1 - window
    return torch.where(hidden_ntL, float("-inf"), 0.0)[:, None, :, None, :]


def gathered_tiles(
    block_table_nB: Tensor, first_n1: Tensor, stop_n1: Tensor, num_columns: int, num_kv_heads: int
) -> Tensor:
    """Rows of the cache seen as (N * C) tiles, ordered [keys or values, sequence, head, block], flat: of each sequence
    ``num_columns`` blocks from column ``first_n1`` of its table on. From column ``stop_n1`` on it is block 0."""
    device = block_table_nB.device
    column_nB = first_n1 + torch.arange(num_columns, device=device)
    own_nB = column_nB < stop_n1
    block_nB = block_table_nB.gather(1, column_nB.clamp_(max=block_table_nB.shape[1] - 1)) * own_nB
    slab_2H1 = torch.arange(2 * num_kv_heads, device=device).view(2, 1, -1, 1)
    return (block_nB.unsqueeze(1) * (2 * num_kv_heads) + slab_2H1).view(-1)


def plan_attention(
    query_start_S1: Sequence[int],
    context_len_S: Sequence[int],
    num_decodes: int,
    block_table_SB: Tensor,
    slot_T: Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    tiles: AttentionTiles,
) -> AttentionPlan:
    """Plans one step. Query at position p sees keys p - window + 1 .. p (all up to p without a window).

    Reads lengths on the host only, so it never waits for the device.
    """
    planner = _Planner(context_len_S, block_table_SB, num_kv_heads, block_size, window, tiles)
    groups = []
    for seqs in _together(context_len_S[:num_decodes], window, block_size, tiles.pairs_at_once // num_kv_heads):
        lengths = [context_len_S[s] for s in seqs]
        contiguous = seqs[-1] - seqs[0] + 1 == len(seqs)
        rows = slice(seqs[0], seqs[-1] + 1) if contiguous else upload(seqs, block_table_SB.device)
        groups.append(planner.group(rows, lengths, [_Cut(rows, [length - 1 for length in lengths], 1)]))
    for s in range(num_decodes, len(context_len_S)):
        start, stop, length = query_start_S1[s], query_start_S1[s + 1], context_len_S[s]
        runs = [(row, min(row + tiles.queries, stop)) for row in range(start, stop, tiles.queries)]
        cuts = [_Cut(slice(row, end), [length - (stop - row)], end - row) for row, end in runs]
        groups.append(planner.group(slice(s, s + 1), [length], cuts))
    write_block_T = slot_T // block_size
    fresh_F = fresh_blocks(query_start_S1, context_len_S, block_table_SB, block_size)
    return AttentionPlan(write_block_T, slot_T - write_block_T * block_size, fresh_F, tuple(groups), tiles)


def _together(
    context_len_S: Sequence[int], window: int | None, block_size: int, keys_at_once: int
) -> Iterator[list[int]]:
    """Sequences grouped by the power of two above their number of blocks, so that at most half of a gather is padding,
    and few enough at a time."""
    buckets: dict[int, list[int]] = {}
    for s, length in enumerate(context_len_S):
        blocks = -(-min(length, window or length) // block_size)
        buckets.setdefault((max(blocks, _SMALLEST_BUCKET_BLOCKS) - 1).bit_length(), []).append(s)
    for power, seqs in buckets.items():
        step = max(1, keys_at_once // (block_size << power))
        for start in range(0, len(seqs), step):
            yield seqs[start : start + step]


def fresh_blocks(
    query_start_S1: Sequence[int], context_len_S: Sequence[int], block_table_SB: Tensor, block_size: int
) -> Tensor | None:
    """The blocks whose first slot is written in this step."""
    rows, entries = [], []
    for s, length in enumerate(context_len_S):
        start = length - (query_start_S1[s + 1] - query_start_S1[s])
        for entry in range(-(-start // block_size), (length - 1) // block_size + 1):
            rows.append(s)
            entries.append(entry)
    if not rows:
        return None
    index_2F = upload([*rows, *entries], block_table_SB.device).view(2, -1)
    return block_table_SB[index_2F[0], index_2F[1]].long()


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 values on ``device``. Through pinned memory: a copy from ordinary memory would wait for the device."""
    host = torch.tensor(values, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def write_kv_(kv_NCbD: Tensor, kv_TCD: Tensor, plan: AttentionPlan) -> None:
    """Stores this step's keys and values (heads of keys, then heads of values) in their slots.

    A block is emptied before its first slot is written: masked slots weigh nothing, but nothing times what another
    sequence may have left there, a NaN, is still a NaN.
    """
    if plan.fresh_blocks_F is not None:
        kv_NCbD.index_fill_(0, plan.fresh_blocks_F, 0)
    kv_NCbD.transpose(1, 2).index_put_((plan.write_block_T, plan.write_offset_T), kv_TCD)


def paged_attention(q_TQD: Tensor, kv_NCbD: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each span over its sequence's keys; out_TQD. This step's own keys and values have
    already been written to the cache by ``write_kv_``."""
    num_tokens, _, width = q_TQD.shape
    num_kv_heads, block_size = kv_NCbD.shape[1] // 2, kv_NCbD.shape[2]
    tiles = kv_NCbD.view(-1, block_size * width)
    out_TQD = torch.empty_like(q_TQD, memory_format=torch.contiguous_format)
    for group in plan.groups:
        kv_2mLD = tiles.index_select(0, group.tiles).view(2, group.num_sequences * num_kv_heads, -1, width)
        kv_2mLD = kv_2mLD[:, :, : group.num_keys].float()
        for queries in group.queries:
            out = _attend(q_TQD[queries.rows], kv_2mLD, queries, group.num_sequences, plan.tiles, scale)
            if out.shape[0] == num_tokens:
                return out
            out_TQD[queries.rows] = out
    return out_TQD


def _attend(
    q_XQD: Tensor, kv_2mLD: Tensor, queries: QueryRun, num_sequences: int, tiles: AttentionTiles, scale: float
) -> Tensor:
    """One run of queries: X = n * t rows of tokens, m = n * H. All of it in fp32."""
    n, t, width = num_sequences, queries.per_sequence, q_XQD.shape[-1]
    num_kv_heads = kv_2mLD.shape[1] // n
    num_rows = t * q_XQD.shape[1] // num_kv_heads
    q_mRD = q_XQD.view(n, t, num_kv_heads, -1, width).transpose(1, 2).reshape(n * num_kv_heads, num_rows, width)
    k_mLD, v_mLD = kv_2mLD[:, :, queries.first_key : queries.stop_key].unbind()
    scores_mRL = scores(_padded(q_mRD.float() * scale, tiles), k_mLD)
    if queries.mask_n1t1L is not None:
        # The G query heads of a key/value head are rows of one product and share a row of the mask.
        masked_nHRL = scores_mRL.view(n, num_kv_heads, -1, k_mLD.shape[1])[:, :, :num_rows]
        masked_nHRL = masked_nHRL[..., queries.mask_from - queries.first_key :]
        masked_nHRL.view(n, num_kv_heads, t, -1, masked_nHRL.shape[-1]).add_(queries.mask_n1t1L)
    probs_mRL = torch.softmax(scores_mRL, -1)
    out_mRD = torch.bmm(probs_mRL[:, :, : tiles.chunk], v_mLD[:, : tiles.chunk])
    for key in range(tiles.chunk, v_mLD.shape[1], tiles.chunk):
        out_mRD.baddbmm_(probs_mRL[:, :, key : key + tiles.chunk], v_mLD[:, key : key + tiles.chunk])
    out_nHtGD = out_mRD[:, :num_rows].to(q_XQD.dtype).reshape(n, num_kv_heads, t, -1, width)
    return out_nHtGD.transpose(1, 2).reshape(q_XQD.shape).contiguous()


def _padded(q_mRD: Tensor, tiles: AttentionTiles) -> Tensor:
    num_rows = q_mRD.shape[1]
    rows = tiles.rows.fit(num_rows)
    assert rows is not None, "plan_attention cuts spans"
    return q_mRD if rows == num_rows else pad(q_mRD, (0, 0, 0, rows - num_rows))


def paged_attention_reference(
    q_TQD: Tensor,
    kv_NCbD: Tensor,
    query_start_S1: Sequence[int],
    context_len_S: Sequence[int],
    block_table_SB: Tensor,
    window: int | None,
    scale: float,
) -> Tensor:
    """The definition, query by query, in fp64, from the cache alone."""
    _, num_slabs, block_size, _ = kv_NCbD.shape
    num_kv_heads = num_slabs // 2
    out_TQD = torch.zeros_like(q_TQD, dtype=torch.float64)
    for s, context_len in enumerate(context_len_S):
        for t in range(query_start_S1[s], query_start_S1[s + 1]):
            position = context_len - (query_start_S1[s + 1] - t)
            keys = range(0 if window is None else max(0, position - window + 1), position + 1)
            slots = [(int(block_table_SB[s, p // block_size]), p % block_size) for p in keys]
            kv_LCD = torch.stack([kv_NCbD[block, :, offset] for block, offset in slots]).double()
            for head in range(q_TQD.shape[1]):
                kv_head = head * num_kv_heads // q_TQD.shape[1]
                probs_L = torch.softmax(kv_LCD[:, kv_head] @ q_TQD[t, head].double() * scale, 0)
                out_TQD[t, head] = probs_L @ kv_LCD[:, num_kv_heads + kv_head]
    return out_TQD.to(q_TQD.dtype)
