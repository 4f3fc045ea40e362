"""A sequence as the scheduler knows it, and what a step does with it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from moestro.protos.sequences import FinishReason, SamplingParams, SequenceLedger, SequenceRequest, TokenLogprobs

NO_LIMIT = 2**62  # tokens


@lru_cache(maxsize=64)
def _end_ids(*token_ids: tuple[int, ...]) -> frozenset[int]:
    """One set for all sequences that end alike: looked into for every token, so it should stay in the cache."""
    return frozenset(chain.from_iterable(token_ids))


def empty_tables(num_groups: int) -> tuple[array[int], ...]:
    """The block tables (int32) of a sequence that holds nothing."""
    return tuple(array("i") for _ in range(num_groups))


class SequenceState:
    """Known tokens and one integer, ``num_computed``: how many of them have their keys and values in the cache.

    Owned by the scheduler, which writes only inside ``plan`` and ``apply``. The runner reads ``token_ids``,
    ``sampling``, ``num_prompt``, ``block_tables`` and what it is asked for (``is_plain``, ``is_traced``,
    ``wants_prompt_logprobs``) between the two, and writes nothing.

    Token ids and block tables are arrays of 32-bit numbers: a waiting prompt takes a tenth of a list's memory, and the
    runner copies a table without looking at its entries.
    """

    __slots__ = (
        "arrived_at",
        "block_tables",
        "capacity",
        "digests",
        "end_ids",
        "first_live",
        "first_output_at",
        "is_cancelled",
        "is_plain",
        "is_traced",
        "key",
        "last_output_at",
        "max_chunk",
        "max_known",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "num_prompt",
        "num_published",
        "num_steps",
        "preempt_at",
        "priority",
        "prompt_logprobs",
        "recomputes",
        "sampling",
        "sequence_id",
        "started_at",
        "steady_until",
        "token_ids",
        "wants_prompt_logprobs",
    )

    def __init__(self, request: SequenceRequest, arrival: int, context_limit: int, num_groups: int, now: float) -> None:
        sampling = request.sampling
        self.sequence_id = request.sequence_id
        self.sampling: SamplingParams = sampling
        self.priority = request.priority
        self.key = (request.priority, arrival)  # the total order of service
        self.token_ids = array("I", request.prompt_ids + request.output_ids)
        self.num_prompt = len(request.prompt_ids)
        self.max_known = min(self.num_prompt + sampling.max_tokens, context_limit)  # known tokens at which it ends
        self.end_ids = _end_ids(sampling.stop_token_ids, () if sampling.ignore_eos else sampling.eos_token_ids)
        self.num_computed = 0
        self.steady_until = 0  # before it, each step computes one token that needs no block and fills none
        self.is_cancelled = False
        self.is_plain = sampling.is_plain
        # Those of prompt tokens are still to be gathered: they go out with the first output token.
        self.wants_prompt_logprobs = sampling.prompt_logprobs is not None and not request.output_ids
        # Diagnostics.
        self.max_chunk = request.diagnostics.max_chunk or NO_LIMIT
        self.preempt_at = request.diagnostics.preempt_at
        self.is_traced = request.diagnostics.trace
        self.recomputes = False  # looks for no prefix: it would find what it wrote itself
        # Blocks. Written by scheduler_tables alone.
        self.block_tables = empty_tables(num_groups)
        self.first_live = [0] * num_groups  # per group: table entries before it are null, behind the window
        self.capacity = 0  # tokens that the tables of every group have room for
        self.digests: list[bytes] = []  # of the full blocks, as far as anybody asked
        self.num_published = 0
        # Account.
        self.arrived_at = now
        self.started_at: float | None = None
        self.first_output_at: float | None = None
        self.last_output_at: float | None = None
        self.num_cached = 0
        self.num_preemptions = 0
        self.num_steps = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    @property
    def num_output(self) -> int:
        """Output tokens so far, replayed ones included."""
        return len(self.token_ids) - self.num_prompt

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Whether the last known token, ``token_id``, ends the sequence. End tokens count only after ``min_tokens``
        output tokens came before them, which is when the sampler stops masking them."""
        if token_id in self.end_ids and self.num_output > self.sampling.min_tokens:
            is_eos = token_id in self.sampling.eos_token_ids and not self.sampling.ignore_eos
            return FinishReason.EOS if is_eos else FinishReason.STOP_TOKEN
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_known else None

    def ledger(self, now: float) -> SequenceLedger:
        """The account as of ``now``, the end of the sequence."""
        started = now if self.started_at is None else self.started_at
        first = now if self.first_output_at is None else self.first_output_at
        last = first if self.last_output_at is None else self.last_output_at
        return SequenceLedger(
            queued_s=started - self.arrived_at,
            prefill_s=first - started,
            decode_s=last - first,
            num_cached_tokens=self.num_cached,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
        )

    def __repr__(self) -> str:
        return f"<{self.sequence_id}: {self.num_computed} of {len(self.token_ids)} computed>"


class Span(NamedTuple):
    """Tokens ``start`` to ``start + length`` of a sequence, computed in this step. A tuple: a step makes thousands."""

    sequence: SequenceState
    start: int
    length: int
    samples: bool  # ends at the last known token: its last row of logits gives the next token


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Spans of a single token come first; within both parts the order is that of service."""

    spans: tuple[Span, ...]
    num_decodes: int  # the first num_decodes spans have exactly one token
    num_tokens: int
    planned_at: float
