"""A plan laid out as tensors, against one token at a time; and that a long context costs no more calls."""

from __future__ import annotations

import random
import sys
from array import array

import numpy as np
import pytest
import torch

from moestro.protos.sequences import Diagnostics, SamplingParams, SequenceRequest
from moestro.workers.batching import build_batch
from moestro.workers.scheduler_sequence import SequenceState, Span, StepPlan

CPU = torch.device("cpu")


def random_span(rng: random.Random, index: int, num_groups: int, block_size: int, is_decode: bool) -> Span:
    known = rng.randint(2, 90)
    start = rng.randrange(known - 1)
    length = 1 if is_decode else rng.randint(2, known - start)
    num_output = rng.choice([0, 0, rng.randrange(known)])
    tokens = [rng.choice([rng.randrange(100), rng.randrange(2**32)]) for _ in range(known)]
    request = SequenceRequest(
        str(index),
        tuple(tokens[: known - num_output]),
        SamplingParams(max_tokens=1000, prompt_logprobs=rng.choice([None, None, 2])),
        output_ids=tuple(tokens[known - num_output :]),
        diagnostics=Diagnostics(trace=rng.random() < 0.2),
    )
    sequence = SequenceState(request, index, 2**20, num_groups, 0.0)
    for table in sequence.block_tables:
        table.extend(rng.randrange(1, 2**31 // block_size) for _ in range(-(-known // block_size) + rng.randrange(3)))
    return Span(sequence, start, length, start + length == known)


def random_plan(rng: random.Random, num_groups: int, block_size: int) -> StepPlan:
    num_decodes, num_longer = rng.choice([(0, 0), (1, 0), (0, 1), (rng.randrange(9), rng.randrange(9))])
    spans = tuple(
        random_span(rng, index, num_groups, block_size, index < num_decodes)
        for index in range(num_decodes + num_longer)
    )
    return StepPlan(spans, num_decodes, sum(span.length for span in spans), 0.0)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_tokens_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    num_groups, block_size = rng.choice([1, 1, 2]), rng.choice([1, 4, 16])
    plan = random_plan(rng, num_groups, block_size)
    batch, rows = build_batch(plan, (plan.num_tokens, 5), block_size, CPU)

    tokens = [(span, position) for span in plan.spans for position in range(span.start, span.start + span.length)]
    place = {(id(span), position): index for index, (span, position) in enumerate(tokens)}
    assert batch.token_ids_T.tolist() == [span.sequence.token_ids[position] for span, position in tokens]
    assert batch.positions_T.tolist() == [position for _, position in tokens]
    assert batch.query_start_S1 == tuple(
        sum(span.length for span in plan.spans[:s]) for s in range(len(plan.spans) + 1)
    )
    assert batch.context_len_S == tuple(span.start + span.length for span in plan.spans)
    assert (batch.num_decodes, batch.num_tokens_N) == (plan.num_decodes, (plan.num_tokens, 5))
    assert len(batch.tables_G) == (num_groups if plan.spans else 0)
    for group, tables in enumerate(batch.tables_G):
        held = [span.sequence.block_tables[group] for span in plan.spans]
        width = max(map(len, held))
        assert tables.block_table_SB.tolist() == [[*table, *[0] * (width - len(table))] for table in held]
        assert tables.block_table_SB.dtype == torch.int32
        assert tables.slot_T.tolist() == [
            span.sequence.block_tables[group][position // block_size] * block_size + position % block_size
            for span, position in tokens
        ]
        assert tables.slot_T.dtype == torch.int64
    expected_rows, expected_prompts = [], []
    for span in plan.spans:
        if span.samples:
            expected_rows.append(place[id(span), span.start + span.length - 1])
    for span in plan.spans:
        if span.sequence.wants_prompt_logprobs:
            last = min(span.start + span.length, span.sequence.num_prompt - 1)
            if span.start < last:
                expected_rows += [place[id(span), position] for position in range(span.start, last)]
                expected_prompts.append((span, last - span.start))
    assert batch.logit_rows_R.tolist() == expected_rows
    assert rows.samples == tuple(span.sequence for span in plan.spans if span.samples)
    assert rows.prompts == tuple(expected_prompts)
    traced = [index for index, (span, _) in enumerate(tokens) if span.sequence.is_traced]
    assert (batch.trace is None) == (not traced)
    if batch.trace is not None:
        assert batch.trace._rows_K.tolist() == traced
    for tensor in (batch.token_ids_T, batch.positions_T, batch.logit_rows_R):
        assert tensor.dtype == torch.int64


def test_later_steps_do_not_change_a_batch() -> None:
    """Nothing of a batch shares memory with a sequence, and nothing keeps its arrays from growing."""
    rng = random.Random(0)
    plan = StepPlan((random_span(rng, 0, 1, 4, True),), 1, 1, 0.0)
    batch, _ = build_batch(plan, (1,), 4, CPU)
    before = [t.clone() for t in (batch.token_ids_T, batch.positions_T, batch.tables_G[0].block_table_SB)]
    sequence = plan.spans[0].sequence
    sequence.token_ids.append(9)
    sequence.block_tables[0].append(9)
    for numbers in (sequence.token_ids, sequence.block_tables[0]):
        numbers[:] = array(numbers.typecode, np.zeros(len(numbers), np.int32).tobytes())
    for old, new in zip(before, (batch.token_ids_T, batch.positions_T, batch.tables_G[0].block_table_SB), strict=True):
        assert torch.equal(old, new)


def num_calls(context: int) -> int:
    request = SequenceRequest("0", tuple(range(context)), SamplingParams(temperature=0.0))
    sequence = SequenceState(request, 0, 2**20, 1, 0.0)
    sequence.block_tables[0].extend(range(1, 1 + -(-context // 16)))
    plan = StepPlan((Span(sequence, context - 1, 1, True),), 1, 1, 0.0)
    build_batch(plan, (1,), 16, CPU)
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        build_batch(plan, (1,), 16, CPU)
    finally:
        sys.setprofile(None)
    return count


def test_a_long_context_costs_no_more_calls() -> None:
    assert num_calls(100_000) == num_calls(100)
