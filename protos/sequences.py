"""The words the rooms speak to each other: one sequence's way through an engine, as plain frozen data.

A client's request with ``n`` choices becomes ``n`` sequences at the edge; below the edge only sequences exist. Text
exists only at the edge as well: a rank sees token ids and nothing else. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

UNBOUNDED = 2**31 - 1  # of a count that nothing bounds


class FinishReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"  # the model's own end-of-sequence token; it is part of the token ids, never of the text
    STOP_TOKEN = "stop_token"  # one of the request's stop_token_ids
    STOP_STRING = "stop_string"  # found at the edge; the rank sees a cancel
    LENGTH = "length"  # max_tokens, or the end of the context
    CANCELLED = "cancelled"  # the client left, or its deadline passed
    ERROR = "error"  # this sequence alone failed; SequenceDelta.error says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the next token. Built by the edge after validation, so every field is known to be in its range.

    Order of operations: logit_bias, repetition / presence / frequency penalties, min_tokens (end tokens masked),
    temperature, then top_k, min_p and top_p on the tempered distribution (each filter sees the result of the one
    before it), then the draw. ``temperature == 0`` is greedy: the largest logit, the smallest id among equals.
    """

    temperature: float = 1.0  # >= 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1]
    repetition_penalty: float = 1.0  # > 0; over prompt and output tokens (Keskar et al. 2019, CTRL)
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0  # unsigned 64 bit; with the position it is the whole state of the noise
    max_tokens: int = 16  # >= 1; output tokens in all, replayed ones included
    min_tokens: int = 0  # no eos and no stop token before this many output tokens
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: none; k: the drawn token's and the k largest
    prompt_logprobs: int | None = None  # likewise for every prompt token but the first

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the largest logit as the model gave it, and only its id is wanted."""
        return (
            self.temperature == 0
            and self.logprobs is None
            and self.min_tokens == 0
            and self.repetition_penalty == 1
            and self.presence_penalty == self.frequency_penalty == 0
            and not self.logit_bias
        )


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Ways to disturb how one sequence is served, none of which may change what comes out."""

    rank: str = ""  # serve it on this rank, or in this group; a gateway's business, unknown below it
    max_chunk: int = 0  # compute at most so many of its tokens a step; 0: no limit of its own
    preempt_at: int | None = None  # preempt it once, when it has so many output tokens
    trace: bool = False  # report digests of its hidden states


@dataclass(frozen=True, slots=True)
class PositionTrace:
    """64-bit digests of one position's hidden state after each decoder layer."""

    position: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to be continued. ``output_ids`` holds what was already accepted when it is a replay."""

    sequence_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    priority: int = 0  # smaller first; equal priorities are first come, first served
    diagnostics: Diagnostics = Diagnostics()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own log probabilities at one position: log softmax of the raw logits, before any of the sampling
    parameters. ``top`` is sorted from the most likely, equal ones by id."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    """What the sampler says of one sequence in one step. ``error`` set: this sequence must end, nothing was drawn.

    A tuple, as a step makes one for each sequence: made in half of a frozen dataclass's time."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SequenceLedger:
    """Where a sequence's time went, in seconds, and what it used. Read by metrics and traces, measured once."""

    queued_s: float = 0.0  # from admission to the first step that computed a token of it
    prefill_s: float = 0.0  # from then to the first output token
    decode_s: float = 0.0  # from the first output token to the last
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were found, not computed
    num_preemptions: int = 0
    num_steps: int = 0  # engine steps that computed something for it


class SequenceDelta(NamedTuple):
    """What one engine step added to one sequence. The last delta of a sequence carries reason and ledger.

    A tuple, as a step makes one for each sequence: made in a quarter of a frozen dataclass's time."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id when asked for, else empty
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, with the first output token; [0] is None
    finish_reason: FinishReason | None = None
    error: str | None = None
    ledger: SequenceLedger | None = None
    trace: tuple[PositionTrace, ...] = ()  # of the positions computed, when asked for


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can ever accept; the edge refuses the rest before any work."""

    vocab_size: int
    max_context: int  # prompt and output tokens together that one sequence can hold, KV pool included
    max_waiting: int  # sequences that may wait; beyond it a submission is refused
    max_running: int = UNBOUNDED  # sequences that run at once
    max_tokens: int = UNBOUNDED  # tokens whose keys and values it holds at once, over all sequences


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A rank's load as of its last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_steps: int = 0
    step_s: float = 0.0  # duration of the last step
    slowness: float = 1.0  # time for the same work against the median of the group; a straggler's is well above 1
    is_shedding: bool = False  # memory runs short: it takes nothing new
