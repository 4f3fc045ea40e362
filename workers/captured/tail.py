"""The end of a captured step: from logits to tokens, for the rows that ask for nothing special.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moestro.protos.sequences import SamplingParams
from moestro.workers.captured.buffers import Noise
from moestro.workers.model.decoder import Decoder
from moestro.workers.sampling.greedy_codes import greedy_codes
from moestro.workers.sampling.noise import row_keys
from moestro.workers.scheduler_sequence import SequenceState


@dataclass(frozen=True, slots=True)
class Tail:
    """``codes`` makes code_R (int64) of logits_RV, temperature_R (fp32) and key_R (int64): a token id, or a negative
    code, as ``greedy_codes`` has them. It is captured, so it never waits. ``draws``: rows with a temperature are drawn;
    else all are greedy, and such rows are left to the sampler."""

    draws: bool
    codes: Callable[[Tensor, Tensor, Tensor], Tensor]

    def serves(self, params: SamplingParams) -> bool:
        """Whether the code of a row with these parameters is its next token."""
        return _asks_for_nothing_else(params) and (params.temperature == 0 or (self.draws and _draws_from_all(params)))

    def noise(self, sequences: list[SequenceState]) -> Noise | None:
        """None where no row is drawn."""
        temperatures = [sequence.sampling.temperature for sequence in sequences]
        if not self.draws or not any(temperatures):
            return None
        seeds = [sequence.sampling.seed for sequence in sequences]
        key_S = row_keys(seeds, [len(sequence.token_ids) for sequence in sequences])
        return Noise(torch.tensor(temperatures, dtype=torch.float32), key_S)


def _asks_for_nothing_else(params: SamplingParams) -> bool:
    return (
        params.logprobs is None
        and not params.logit_bias
        and not params.min_tokens
        and params.frequency_penalty == params.presence_penalty == 0
        and params.repetition_penalty == 1
    )


def _draws_from_all(params: SamplingParams) -> bool:
    return params.top_k == 0 and params.top_p == 1 and params.min_p == 0


GREEDY = Tail(False, lambda logits_RV, temperature_R, key_R: greedy_codes(logits_RV))


def choose_tail(decoder: Decoder) -> Tail:
    """The one of the decoder's backend. CUDA's kernel could draw as well, but its logarithms may differ from the eager
    sampler's in the last bit, and which of the two computes a step depends on a row's company: before the sampler
    draws with the same kernel, it serves greedy rows only, whose choice is exact."""
    if decoder.stack.backend.name != "cuda":
        return GREEDY
    sample_rows: Any = import_module("moestro.kernels.cuda.sampling").sample_rows  # Triton is there only with CUDA
    return Tail(False, lambda logits_RV, temperature_R, key_R: sample_rows(logits_RV, temperature_R, key_R)[0])
