"""A plan becomes tensors.

Legend: T tokens of the step, N ranks of the group, S spans, B block-table columns, R rows whose logits are wanted.

Runs once a step on the host, beside every step's work: what is asked of each sequence goes through ``zip``, ``map`` and
``bytes.join`` rather than through a loop, and no entry of a block table is looked at in Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import add

import numpy as np
import numpy.typing as npt
import torch

from moestro.workers.batch import Batch, CacheTables
from moestro.workers.hidden_trace import HiddenTrace
from moestro.workers.scheduler_sequence import SequenceState, Span, StepPlan

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Which rows of the logits are whose: first one row per sampling span, then each span's prompt rows."""

    samples: tuple[SequenceState, ...]
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
    sequences, starts, lengths, samples = zip(*spans, strict=True) if spans else ((), (), (), ())
    query_start_S1 = tuple(accumulate(lengths, initial=0))
    span_T = np.arange(len(spans)).repeat(np.array(lengths, np.int64))
    # A token's position is its place in the step plus a number that all tokens of its span share.
    shift_S = np.array(starts, np.int64) - np.array(query_start_S1[:-1], np.int64)
    position_T = shift_S[span_T] + np.arange(plan.num_tokens)
    column_T = position_T // block_size
    within_T = position_T - column_T * block_size
    tables = []
    for group in range(len(sequences[0].block_tables) if sequences else 0):
        block_table_SB = _padded([s.block_tables[group] for s in sequences])
        slot_T = block_table_SB[span_T, column_T] * np.int64(block_size) + within_T
        tables.append(CacheTables(_to(block_table_SB, device), _to(slot_T, device)))
    wanting = [i for i, s in enumerate(sequences) if s.wants_prompt_logprobs]
    prompts = [(i, count) for i in wanting if (count := prompt_rows(spans[i]))]
    rows = [end - 1 for end in compress(query_start_S1[1:], samples)]
    for index, count in prompts:
        rows.extend(range(query_start_S1[index], query_start_S1[index] + count))
    traced = [i for i, s in enumerate(sequences) if s.is_traced]
    batch = Batch(
        token_ids_T=_to(_token_ids(plan), device),
        positions_T=_to(position_T, device),
        query_start_S1=query_start_S1,
        context_len_S=tuple(map(add, starts, lengths)),
        num_decodes=plan.num_decodes,
        tables_G=tuple(tables),
        logit_rows_R=_to(np.array(rows, np.int64), device),
        num_tokens_N=num_tokens_N,
        trace=HiddenTrace(_to(np.flatnonzero(np.isin(span_T, traced)), device)) if traced else None,
    )
    return batch, LogitRows(tuple(compress(sequences, samples)), tuple((spans[i], count) for i, count in prompts))


def _token_ids(plan: StepPlan) -> _Ints:
    token_ids_T = array("I", [sequence.token_ids[start] for sequence, start, _, _ in plan.spans[: plan.num_decodes]])
    for sequence, start, length, _ in plan.spans[plan.num_decodes :]:
        token_ids_T += sequence.token_ids[start : start + length]
    return np.array(token_ids_T, np.int64)


def _padded(tables: Sequence[array[int]]) -> npt.NDArray[np.int32]:
    """One row per table, filled up with the null block."""
    lengths = [*map(len, tables)]
    table_SB = np.zeros((len(tables), max(lengths)), np.int32)
    is_held_SB = np.arange(table_SB.shape[1]) < np.array(lengths)[:, None]
    table_SB[is_held_SB] = np.frombuffer(b"".join(tables), np.int32)
    return table_SB


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
