"""The shapes of attention's products that give a query the same bits.

Legend: R rows, C keys of a chunk, D head width, n products of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from moestro.kernels.row_tiles import RowTiles, agreeing_rows, cancelling_operands, row_counts

CHUNK = 128
"""Keys whose weighted values are summed by one product, at positions 0 .. 127, 128 .. 255 and so on. MKL cuts longer
sums in two (seen at 160 and 320 keys), in places that depend on their length."""

_GRAIN = 32  # two vectors of 16: what softmax adds up in one go
_MOST_ROWS = 256
_BATCHES = (1, 2, 5)  # one product alone may be shared out among threads in another way than several
_WIDENED_AT_ONCE = {"cpu": 1 << 19}


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """``rows``: the rows a product may have. ``grain``: its keys are a multiple. ``queries``: how many of one sequence
    are computed together. ``pairs_at_once``: (key, head) pairs of decoding sequences that are widened to fp32 together,
    so that they stay in the cache."""

    rows: RowTiles
    chunk: int
    grain: int
    queries: int
    pairs_at_once: int


def scores(q_nRD: Tensor, k_nLD: Tensor) -> Tensor:
    """q k^T."""
    return torch.bmm(q_nRD, k_nLD.transpose(1, 2))


def attention_tiles(head_dim: int, group: int, device: torch.device) -> AttentionTiles:
    """For heads of ``head_dim`` and ``group`` query heads per key/value head. Tried out once per shape and number of
    threads."""
    if device.type == "meta":  # where a model is only measured
        return _untried(head_dim, group, device)
    return _tried(head_dim, group, device, torch.get_num_threads())


def _untried(head_dim: int, group: int, device: torch.device) -> AttentionTiles:
    return _tiles(RowTiles(row_counts(_MOST_ROWS)), _GRAIN, head_dim, group, device)


def _tiles(rows: RowTiles, grain: int, head_dim: int, group: int, device: torch.device) -> AttentionTiles:
    queries = max(1, max(rows.counts) // group)
    widened = _WIDENED_AT_ONCE.get(device.type, 1 << 28)
    return AttentionTiles(rows, CHUNK, grain, queries, max(1, widened // (2 * head_dim)))


@cache
def _tried(head_dim: int, group: int, device: torch.device, threads: int) -> AttentionTiles:
    counts = row_counts(_MOST_ROWS)
    q_PD, k_CD = cancelling_operands(CHUNK, head_dim, torch.float32, device)
    p_PC, v_DC = cancelling_operands(head_dim, CHUNK, torch.float32, device)
    agreeing = set(counts)
    for batch in _BATCHES:
        k_nCD, v_nCD = k_CD.repeat(batch, 1, 1), v_DC.T.repeat(batch, 1, 1)
        agreeing &= agreeing_rows(partial(_in_batch, scores, k_nCD), q_PD, counts).exact
        agreeing &= agreeing_rows(partial(_in_batch, torch.bmm, v_nCD), p_PC, counts).exact
    rows = RowTiles(tuple(sorted(agreeing)))
    may_be_short = all(_may_be_short(keys, rows, head_dim, device) for keys in range(_GRAIN, CHUNK, _GRAIN))
    return _tiles(rows, _GRAIN if may_be_short else CHUNK, head_dim, group, device)


def _may_be_short(keys: int, rows: RowTiles, head_dim: int, device: torch.device) -> bool:
    """Whether a chunk of its first ``keys`` keys, the others having no weight, gives the bits of the whole chunk."""
    q_PD, k_CD = cancelling_operands(CHUNK, head_dim, torch.float32, device)
    p_PL, v_DL = cancelling_operands(head_dim, keys, torch.float32, device)
    p_1C, v_CD = pad(p_PL[:1], (0, CHUNK - keys)), pad(v_DL.T, (0, 0, 0, CHUNK - keys), value=1.0)
    for count in rows.counts:
        q_RD, p_RC = q_PD[:1].repeat(count, 1), p_1C.repeat(count, 1)
        for batch in _BATCHES:
            k_nCD, v_nCD = k_CD.repeat(batch, 1, 1), v_CD.repeat(batch, 1, 1)
            same_scores = torch.equal(
                _in_batch(scores, k_nCD, q_RD)[:, :keys], _in_batch(scores, k_nCD[:, :keys], q_RD)
            )
            short_RD = _in_batch(torch.bmm, v_nCD[:, :keys], p_RC[:, :keys])
            if not same_scores or not torch.equal(short_RD, _in_batch(torch.bmm, v_nCD, p_RC)):
                return False
    return True


def _in_batch(product: Callable[[Tensor, Tensor], Tensor], k_nXX: Tensor, q_RX: Tensor) -> Tensor:
    """The rows of all n products, one after another."""
    out_nRX = product(q_RX.repeat(len(k_nXX), 1, 1), k_nXX)
    return out_nRX.view(-1, out_nRX.shape[-1])
