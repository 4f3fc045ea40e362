"""What the sampler must know of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moestro.protos.sequences import SamplingParams


class SamplingRow(NamedTuple):
    """One row of the logits. ``token_ids`` are the known tokens, the first ``num_prompt`` of them the prompt: read only
    where penalties ask for them, so that a row costs nothing per token. ``position`` is the index in the sequence of
    the token to be drawn, the number of tokens before it."""

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt: int
    position: int

    @property
    def output_ids(self) -> Sequence[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt
