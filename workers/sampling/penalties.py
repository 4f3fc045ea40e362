"""What a request's parameters do to logits before the temperature: bias, penalties, masks of end tokens.

Legend: S = rows that are edited, V = vocabulary, N = (row, token) pairs of all rows in one flat list.

All functions write in place into ``x_SV`` (float32, contiguous) and touch only the pairs they are given. Token ids
outside [0, V) are ignored: they have no logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moestro.protos.sequences import SamplingParams
from moestro.workers.sampling.rows import SamplingRow
from moestro.workers.sampling.transfer import upload

_Ids = npt.NDArray[np.int64]


def edits(row: SamplingRow) -> bool:
    """Whether this row's logits are edited at all in this step."""
    return bool(row.params.logit_bias) or masks_end_tokens(row) or _repeats(row.params) or _counts(row.params)


def edit_(x_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """All edits in the order that SamplingParams fixes: bias, penalties, end tokens."""
    add_bias_(x_SV, rows)
    penalize_repetition_(x_SV, rows)
    penalize_counts_(x_SV, rows)
    mask_end_tokens_(x_SV, rows)


def add_bias_(x_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """logit += logit_bias[id] (OpenAI's definition: -100 bans and +100 forces in practice)."""
    biased = [(s, row.params.logit_bias) for s, row in enumerate(rows) if row.params.logit_bias]
    if not biased:
        return
    index_N = _flat_index(x_SV, [(s, list(bias)) for s, bias in biased])
    values = [value for _, bias in biased for token, value in bias.items() if 0 <= token < x_SV.shape[1]]
    flat = x_SV.view(-1)
    flat[index_N] = flat[index_N] + upload(values, torch.float32, x_SV.device)


def penalize_repetition_(x_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """A token seen in prompt or output: a positive logit is divided by the penalty, a negative one multiplied
    (Keskar et al. 2019, CTRL; as in transformers' RepetitionPenaltyLogitsProcessor)."""
    chosen = [(s, row) for s, row in enumerate(rows) if _repeats(row.params)]
    if not chosen:
        return
    seen = [(s, as_ids(row.token_ids)) for s, row in chosen]
    index_N = _flat_index(x_SV, seen)
    penalty_N = _row_values(x_SV, rows, index_N, [row.params.repetition_penalty for row in rows])
    flat = x_SV.view(-1)
    old_N = flat[index_N]
    # A pair listed twice is written twice with the same value.
    flat[index_N] = torch.where(old_N < 0, old_N * penalty_N, old_N / penalty_N)


def penalize_counts_(x_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """logit -= frequency_penalty * count(id) + presence_penalty * (count(id) > 0), counted over output tokens alone
    (OpenAI's definition)."""
    chosen = [(s, row) for s, row in enumerate(rows) if _counts(row.params)]
    if not chosen:
        return
    index_N = _flat_index(x_SV, [(s, as_ids(row.output_ids)) for s, row in chosen])
    frequency_N = _row_values(x_SV, rows, index_N, [row.params.frequency_penalty for row in rows])
    presence_N = _row_values(x_SV, rows, index_N, [row.params.presence_penalty for row in rows])
    count = torch.zeros(x_SV.numel(), dtype=torch.int32, device=x_SV.device)
    count.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.int32))
    flat = x_SV.view(-1)
    flat[index_N] = flat[index_N] - frequency_N * count[index_N] - presence_N


def mask_end_tokens_(x_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """eos and stop tokens become minus infinity in rows that have fewer than min_tokens output tokens."""
    masked = [(s, row) for s, row in enumerate(rows) if masks_end_tokens(row)]
    if not masked:
        return
    index_N = _flat_index(x_SV, [(s, row.params.eos_token_ids + row.params.stop_token_ids) for s, row in masked])
    x_SV.view(-1).index_fill_(0, index_N, float("-inf"))


def masks_end_tokens(row: SamplingRow) -> bool:
    """Whether min_tokens forbids this row to end now."""
    params = row.params
    forbids = params.min_tokens > 0 and row.num_output < params.min_tokens
    return forbids and bool(params.eos_token_ids or params.stop_token_ids)


def as_ids(ids: Sequence[int] | _Ids) -> _Ids:
    """Token ids as an array of its own; an int64 array costs nothing, ``array`` a copy, a tuple some 40 ns a token."""
    return ids if isinstance(ids, np.ndarray) else np.array(ids, dtype=np.int64)


def _repeats(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0


def _counts(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _flat_index(x_SV: Tensor, pairs: Sequence[tuple[int, Sequence[int] | _Ids]]) -> Tensor:
    """Indices [N] int64 into the flattened logits, on their device."""
    vocab_size = x_SV.shape[1]
    parts = []
    for s, ids in pairs:
        array = as_ids(ids)
        inside = array[(array >= 0) & (array < vocab_size)]  # another's row would be hit otherwise
        parts.append(inside + s * vocab_size)
    return upload(torch.from_numpy(np.concatenate(parts)), torch.int64, x_SV.device)


def _row_values(x_SV: Tensor, rows: Sequence[SamplingRow], index_N: Tensor, values: Sequence[float]) -> Tensor:
    """The value [N] of the row that each index lies in."""
    return upload(values, torch.float32, x_SV.device)[index_N // x_SV.shape[1]]
