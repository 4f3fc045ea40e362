"""What the sampler must know of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moestro.protos.sequences import SamplingParams


class SamplingRow(NamedTuple):
    """One row of the logits. ``position`` is the index in the sequence of the token to be drawn: the number of prompt
    and output tokens before it. The ids are read only for penalties (``output_ids`` also for min_tokens, by length)."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    position: int
