"""A plan becomes tensors.

Legend: T tokens of the step, N ranks of the group, S sequences, B block-table columns, R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from moestro.workers.batch import Batch, CacheTables
from moestro.workers.hidden_trace import HiddenTrace
from moestro.workers.scheduler_sequence import Span, StepPlan


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Which rows of the logits are whose: first one row per sampling span, then each span's prompt rows."""

    samples: tuple[Span, ...]
    prompts: tuple[tuple[Span, int], ...]  # span, number of rows


def prompt_rows(span: Span) -> int:
    """How many tokens of the span have a next token that is a prompt token whose log probability is wanted."""
    if not span.sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(span.start + span.length, span.sequence.num_prompt - 1) - span.start)


def build_batch(
    plan: StepPlan, num_tokens_N: tuple[int, ...], block_size: int, device: torch.device
) -> tuple[Batch, LogitRows]:
    """Lays the spans of a plan out one after another. A plan without spans gives a batch of zero tokens."""
    spans = plan.spans
    num_groups = len(spans[0].sequence.block_tables) if spans else 0
    start_S = np.fromiter((span.start for span in spans), np.int64, len(spans))
    length_S = np.fromiter((span.length for span in spans), np.int64, len(spans))
    end_S1 = np.zeros(len(spans) + 1, np.int64)
    np.cumsum(length_S, out=end_S1[1:])
    token_ids_T = np.fromiter(
        chain.from_iterable(span.sequence.token_ids[span.start : span.start + span.length] for span in spans),
        np.int64,
        plan.num_tokens,
    )
    position_T = np.repeat(start_S - end_S1[:-1], length_S) + np.arange(plan.num_tokens)
    sequence_T = np.repeat(np.arange(len(spans)), length_S)
    tables = []
    for group in range(num_groups):
        block_table_SB = _table([span.sequence.block_tables[group] for span in spans])
        slot_T = block_table_SB[sequence_T, position_T // block_size].astype(np.int64) * block_size
        slot_T += position_T % block_size
        tables.append(CacheTables(_to(block_table_SB, device), _to(slot_T, device)))
    samples = [index for index, span in enumerate(spans) if span.samples]
    prompts = [(index, count) for index, span in enumerate(spans) if (count := prompt_rows(span))]
    row_parts = [end_S1[1:][samples] - 1] + [np.arange(end_S1[i], end_S1[i] + count) for i, count in prompts]
    batch = Batch(
        token_ids_T=_to(token_ids_T, device),
        positions_T=_to(position_T, device),
        query_start_S1=tuple(end_S1.tolist()),
        context_len_S=tuple((start_S + length_S).tolist()),
        num_decodes=plan.num_decodes,
        tables_G=tuple(tables),
        logit_rows_R=_to(np.concatenate(row_parts), device),
        num_tokens_N=num_tokens_N,
        trace=_trace(spans, end_S1, device),
    )
    return batch, LogitRows(tuple(spans[i] for i in samples), tuple((spans[i], count) for i, count in prompts))


def _trace(
    spans: tuple[Span, ...], end_S1: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device
) -> HiddenTrace | None:
    """For the rows of the spans of sequences that are traced, span after span; None when there are none."""
    traced = [np.arange(end_S1[i], end_S1[i + 1]) for i, span in enumerate(spans) if span.sequence.is_traced]
    return HiddenTrace(_to(np.concatenate(traced), device)) if traced else None


def _table(rows: list[list[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    width = max(map(len, rows))
    table = np.zeros((len(rows), width), np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
