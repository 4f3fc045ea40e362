"""A step of attention as tensors on the device.

Legend: T tokens, S sequences, B columns of the block table, N query blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moestro.kernels.backend import Decodes, Spans

_COUNT, _POSITION = 2, 3


@dataclass(frozen=True, slots=True)
class Work:
    """Query blocks of one launch. ``blocks_4N`` is int32: a block's row in the block table, its first token in the
    step, its number of queries (0: padding, whose token's result is zero) and the position of its first query in the
    sequence."""

    blocks_4N: Tensor
    queries: int  # of a block, at most
    segments: int  # of keys that any block sees, at most


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """One step of the layers that share a block table and a shape: decodes, then everything else."""

    block_table_SB: Tensor  # int32
    slot_T: Tensor  # int64; negative: padding
    works: tuple[Work, ...]


def plan_decodes(decodes: Decodes, *, segment: int, window: int | None) -> CudaPlan:
    """By operations on the device alone, so that it can be part of a captured step. Launches are as large as the
    longest context that the table has room for; what a sequence does not have ends at once."""
    num_seqs, columns = decodes.block_table_SB.shape
    row_S = torch.arange(num_seqs, dtype=torch.int32, device=decodes.block_table_SB.device)
    context_len_S = decodes.context_len_S.to(torch.int32)
    blocks_4N = torch.stack((row_S, row_S, context_len_S.clamp(max=1), context_len_S - 1))
    longest = columns * decodes.block_size
    seen = longest if window is None else min(longest, window)
    # Wherever they begin: as many keys may touch one segment more than they fill.
    segments = min(-(-longest // segment), (seen - 2) // segment + 2)
    return CudaPlan(decodes.block_table_SB, decodes.slot_S, (Work(blocks_4N, 1, segments),))


def make_plan(spans: Spans, *, queries: int, segment: int, window: int | None) -> CudaPlan:
    """``queries``: of a query block that is no decode; ``segment``: keys. Reads lengths on the host only, so it never
    waits for the device."""
    start_S1 = np.asarray(spans.query_start_S1, np.int32)
    length_S = np.diff(start_S1)
    position_S = np.asarray(spans.context_len_S, np.int32) - length_S
    row_S = np.arange(len(length_S), dtype=np.int32)
    device, decodes = spans.block_table_SB.device, spans.num_decodes
    works = []
    if decodes:
        blocks_4N = np.stack([row_S, start_S1[:-1], length_S, position_S])[:, :decodes]
        works.append(_work(blocks_4N, 1, segment, window, device))
    if decodes < len(length_S):
        num_S = -(-length_S[decodes:] // queries)
        row_N = np.repeat(row_S[decodes:], num_S)
        first_N = (np.arange(len(row_N)) - np.repeat(np.cumsum(num_S) - num_S, num_S)) * queries
        count_N = np.minimum(length_S[row_N] - first_N, queries)
        blocks_4N = np.stack([row_N, start_S1[row_N] + first_N, count_N, position_S[row_N] + first_N])
        # Those with the most keys first, so that the last to be begun are soon done.
        blocks_4N = blocks_4N[:, np.argsort(-blocks_4N[_POSITION], kind="stable")]
        works.append(_work(blocks_4N, queries, segment, window, device))
    return CudaPlan(spans.block_table_SB, spans.slot_T, tuple(works))


def _work(
    blocks_4N: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    queries: int,
    segment: int,
    window: int | None,
    device: torch.device,
) -> Work:
    first_N, last_N = blocks_4N[_POSITION], blocks_4N[_POSITION] + blocks_4N[_COUNT] - 1
    first_key_N = np.zeros_like(first_N) if window is None else np.maximum(0, first_N - window + 1)
    segments = int((last_N // segment - first_key_N // segment).max()) + 1
    return Work(_upload(blocks_4N, device), queries, segments)


def _upload(values: np.ndarray[tuple[int, ...], np.dtype[np.int32]], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(values, np.int32))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
