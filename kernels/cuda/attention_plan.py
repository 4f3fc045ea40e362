"""A step of attention as tensors on the device: what a launch reads, and what a captured launch can be given anew.

Legend: T tokens, S sequences, B columns of the block table, N query blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moestro.kernels.backend import Spans

_ROW, _TOKEN, _COUNT, _POSITION = range(4)


@dataclass(frozen=True, slots=True)
class Work:
    """Query blocks of one launch. ``blocks_4N`` is int32: a block's row in the block table, its first token in the step,
    its number of queries (0: padding) and the position of its first query in the sequence."""

    blocks_4N: Tensor
    queries: int  # of a block, at most
    segments: int  # of keys that any block sees, at most


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """One step of the layers that share a block table and a shape: decodes, then everything else."""

    block_table_SB: Tensor  # int32
    slot_T: Tensor  # int64; negative: padding
    works: tuple[Work, ...]

    def copy_(self, other: CudaPlan) -> None:
        """Makes this plan the other's step, in the same memory: for a captured step, between two replays. What this one
        has room for beyond the other is padding: its tokens write nothing and their rows of the result are zero.

        Raises ValueError where the other does not fit.
        """
        (num_seqs, columns), num_tokens = other.block_table_SB.shape, other.slot_T.shape[0]
        fits = num_seqs <= self.block_table_SB.shape[0] and columns <= self.block_table_SB.shape[1]
        fits &= num_tokens <= self.slot_T.shape[0] and len(other.works) == len(self.works)
        for mine, theirs in zip(self.works, other.works, strict=False):
            fits &= theirs.blocks_4N.shape[1] <= mine.blocks_4N.shape[1]
            fits &= theirs.segments <= mine.segments and theirs.queries == mine.queries
        if not fits:
            raise ValueError(f"{_size(other)} do not fit into {_size(self)}")
        self.block_table_SB[:num_seqs, :columns].copy_(other.block_table_SB, non_blocking=True)
        self.slot_T[:num_tokens].copy_(other.slot_T, non_blocking=True)
        self.slot_T[num_tokens:].fill_(-1)
        for mine, theirs in zip(self.works, other.works, strict=True):
            num_blocks = theirs.blocks_4N.shape[1]
            mine.blocks_4N[:, :num_blocks].copy_(theirs.blocks_4N, non_blocking=True)
            mine.blocks_4N[_COUNT, num_blocks:].fill_(0)


def decode_buffers(num_sequences: int, columns: int, segments: int, device: torch.device) -> CudaPlan:
    """The plan of a step that decodes nothing yet, with room for ``num_sequences``: to be captured, then refilled by
    ``copy_``. ``segments``: see ``count_segments`` of the longest context that a replay may see."""
    blocks_4N = np.zeros((4, num_sequences), np.int32)
    blocks_4N[_ROW] = blocks_4N[_TOKEN] = np.arange(num_sequences)
    return CudaPlan(
        torch.zeros(num_sequences, columns, dtype=torch.int32, device=device),
        torch.full((num_sequences,), -1, dtype=torch.int64, device=device),
        (Work(_upload(blocks_4N, device), 1, segments),),
    )


def make_plan(spans: Spans, *, queries: int, segment: int, window: int | None) -> CudaPlan:
    """``queries``: of a query block that is no decode; ``segment``: keys. Reads lengths on the host only, so it never waits
    for the device."""
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


def count_segments(first_query: int, last_query: int, segment: int, window: int | None) -> int:
    """Segments that queries at these positions see between them."""
    first_key = 0 if window is None else max(0, first_query - window + 1)
    return last_query // segment - first_key // segment + 1


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


def _size(plan: CudaPlan) -> str:
    blocks = [(work.blocks_4N.shape[1], work.queries, work.segments) for work in plan.works]
    return (
        f"{tuple(plan.block_table_SB.shape)} of the block table, {plan.slot_T.shape[0]} tokens and blocks "
        f"(number, queries, segments) {blocks}"
    )
