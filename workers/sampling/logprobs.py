"""Log probabilities of the model itself: log softmax of the raw logits, before any sampling parameter.

Legend: G = rows that ask, T = prompt positions, V = vocabulary, K = the K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.protos.sequences import TokenLogprobs
from moestro.workers.sampling.ordering import ranked

_ELEMENTS_AT_ONCE = 1 << 24  # logits worked on at a time, which bounds the scratch memory to some 300 MB


def packed_logprobs(logits_GV: Tensor, id_G: Tensor, k: int) -> Tensor:
    """[G, 1 + 2 K] float64: the log probability of the token ``id_G``, then the ids of the ``k`` most likely tokens
    (equal ones by id) and their log probabilities. One tensor, so that one copy brings it to the host; float64
    holds ids and float32 values exactly. K = min(k, V)."""
    logprob_GV = torch.log_softmax(logits_GV, dim=1)
    parts = [logprob_GV.gather(1, id_G[:, None])]
    width = min(k, logits_GV.shape[1])
    if width:
        _, top_GK = ranked(logits_GV, width)
        parts += [top_GK, logprob_GV.gather(1, top_GK)]
    return torch.cat([part.to(torch.float64) for part in parts], dim=1)


def unpack_logprobs(token_id: int, packed: Sequence[float], k: int) -> TokenLogprobs:
    """One row of ``packed_logprobs`` on the host; its first ``k`` tokens where more were asked of the batch."""
    width = (len(packed) - 1) // 2
    ids, values = packed[1 : 1 + width], packed[1 + width :]
    return TokenLogprobs(token_id, packed[0], tuple((int(i), v) for i, v in zip(ids[:k], values[:k], strict=True)))


def prompt_logprobs(logits_TV: Tensor, next_id_T: Sequence[int] | Tensor, k: int) -> tuple[TokenLogprobs, ...]:
    """What the model thought of each prompt token that followed: row t of the logits [T, V] predicts ``next_id_T[t]``.

    ``k`` >= 0 most likely tokens each. Non-finite logits give NaN for their own row alone.
    Raises ValueError where the lengths differ or an id lies outside [0, V).
    """
    num_rows, vocab_size = logits_TV.shape
    ids = next_id_T.tolist() if isinstance(next_id_T, Tensor) else list(next_id_T)
    if len(ids) != num_rows:
        raise ValueError(f"next_id_T must have one id for each of the {num_rows} rows, not {len(ids)}")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"next_id_T must be in [0, {vocab_size}), not {token}")
    if k < 0:
        raise ValueError(f"k must be at least 0, not {k}")
    id_T = torch.tensor(ids, dtype=torch.int64, device=logits_TV.device)
    step = max(1, _ELEMENTS_AT_ONCE // vocab_size)
    packed = [packed_logprobs(logits_TV[t : t + step].float(), id_T[t : t + step], k) for t in range(0, num_rows, step)]
    host = [row for part in packed for row in part.tolist()]
    return tuple(unpack_logprobs(token, row, k) for token, row in zip(ids, host, strict=True))
