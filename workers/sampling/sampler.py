"""From logits to tokens.

Legend: R = rows of the batch, S = rows that are not plainly greedy, G = rows of one group, V = vocabulary, W = tokens
of a row that are ranked.

A draw is a Gumbel-max (Gumbel 1954; Maddison et al. 2014): the argmax of tempered logits plus Gumbel noise is a draw
from their softmax. With the counter-based noise of ``noise.py`` a row's token depends on its own logits, parameters,
tokens, seed and position, and on nothing else. To keep that true to the last bit a row's arithmetic is elementwise,
an argmax, or sums of integers, and its choice of path depends on its own parameters alone.

Only rows that need an operation pay for it: plainly greedy rows are one argmax for the whole batch, edits touch the
tokens they name, and only rows with top_k or top_p are ranked. On an accelerator the host waits once, for the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moestro.protos.sequences import SampledToken, SamplingParams
from moestro.workers.sampling.filters import OFF_TOP_P, log_min_p, surviving
from moestro.workers.sampling.greedy import ALL_MINUS_INF, NAN, PLUS_INF, coded, largest
from moestro.workers.sampling.logprobs import packed_logprobs, unpack_logprobs
from moestro.workers.sampling.noise import gumbel_, row_keys, uniform_at, uniform_vocab
from moestro.workers.sampling.ordering import ranked
from moestro.workers.sampling.penalties import edit_, edits
from moestro.workers.sampling.rows import SamplingRow
from moestro.workers.sampling.transfer import upload

__all__ = ["SamplingRow", "sample", "sample_step"]

_EDITED_AWAY = -4
_new_tuple = tuple.__new__  # of all fields, without the detour through Python that a NamedTuple's own __new__ takes
_ERRORS = {
    NAN: "the model's logits contain NaN",
    PLUS_INF: "the model's logits contain +Inf",
    ALL_MINUS_INF: "the model's logits are all -Inf",
    _EDITED_AWAY: "logit_bias, penalties and min_tokens left no finite largest logit",
}
NOTHING_DRAWN = -1
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # smaller ones would divide zero by zero
_LEAST_WIDTH = 16
_SCRATCH_ELEMENTS = {"cpu": 1 << 17}


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Draws the next token of every row.

    ``logits_RV``: float32 [R, V], left as it is. The result has one entry a row. A row whose logits contain NaN or
    +Inf, or no finite one, gets an error and token id -1, and so does a row whose own parameters leave no token;
    the others are not affected. Raises ValueError where shapes or dtype are wrong.
    """
    if logits_RV.shape[0] != len(rows):
        raise ValueError(f"rows must have one entry for each of the {logits_RV.shape[0]} rows, not {len(rows)}")
    return sample_step(logits_RV, {r: row for r, row in enumerate(rows) if not row.params.is_plain})


def sample_step(logits_RV: Tensor, special: Mapping[int, SamplingRow]) -> list[SampledToken]:
    """The same for whoever knows which rows are not plain (``SamplingParams.is_plain``): those of ``special``, by
    their index. Nothing is looked at one by one for the others."""
    if logits_RV.ndim != 2 or logits_RV.shape[1] == 0:
        raise ValueError(f"logits_RV must have shape [R, V] with V >= 1, not {tuple(logits_RV.shape)}")
    if logits_RV.dtype != torch.float32:
        raise ValueError(f"logits_RV must be float32, not {logits_RV.dtype}")
    code_R = coded(*largest(logits_RV))
    edited = [r for r, row in special.items() if row.params.temperature > 0 or edits(row)]
    if edited:
        index_S = upload(edited, torch.int64, logits_RV.device)
        drawn_S = _draw(logits_RV.index_select(0, index_S), [special[r] for r in edited])
        raw_S = code_R[index_S]
        code_R[index_S] = torch.where(raw_S < 0, raw_S, drawn_S)
    asking = {r: row.params.logprobs for r, row in special.items() if row.params.logprobs is not None}
    if asking:
        return _with_logprobs(logits_RV, code_R, asking)
    codes = code_R.tolist()
    return [_new_tuple(SampledToken, (code, None, None)) if code >= 0 else _failed(code) for code in codes]


def _draw(x_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids [S] int64, or an error code, of rows with an edit or a temperature. Overwrites ``x_SV``."""
    if any(edits(row) for row in rows):
        edit_(x_SV, rows)
    best_S, token_S = largest(x_SV)
    groups: dict[int, list[int]] = {}
    for s, row in enumerate(rows):
        if row.params.temperature > 0:
            groups.setdefault(_ranked_width(row.params, x_SV.shape[1]), []).append(s)
    for width, members in groups.items():
        for part in _portions(members, x_SV):
            index_G = upload(part, torch.int64, x_SV.device)
            chosen = [rows[s] for s in part]
            y_GV = _temper(x_SV.index_select(0, index_G), best_S[index_G], chosen)
            token_S[index_G] = _draw_ranked(y_GV, chosen, width) if width else _draw_unranked(y_GV, chosen)
    return torch.where(best_S.isfinite(), token_S, _EDITED_AWAY)


def _portions(members: Sequence[int], x_SV: Tensor) -> list[Sequence[int]]:
    """Rows few enough that the scratch tensors stay in the cache of a CPU core, or in bounds on an accelerator."""
    step = max(1, _SCRATCH_ELEMENTS.get(x_SV.device.type, 1 << 25) // x_SV.shape[1])
    return [members[start : start + step] for start in range(0, len(members), step)]


def _ranked_width(params: SamplingParams, vocab_size: int) -> int:
    """How many tokens of the row must be put in order: none without top_k and top_p, few with top_k, else all.

    Of the row's own parameters alone, so that neighbours cannot change it; a power of two, so that a batch has few
    groups."""
    if 0 < params.top_k < vocab_size:
        return min(vocab_size, max(_LEAST_WIDTH, 1 << (params.top_k - 1).bit_length()))
    return vocab_size if params.top_p < 1 else 0


def _temper(x_GV: Tensor, best_G: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(x - max) / temperature, in place: the largest is zero, so that no temperature can overflow upwards."""
    temperature_G = upload([max(row.params.temperature, _LEAST_TEMPERATURE) for row in rows], x_GV.dtype, x_GV.device)
    return x_GV.sub_(best_G[:, None]).div_(temperature_G[:, None])


def _draw_unranked(y_GV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Ids [G] drawn from all tokens that min_p leaves."""
    if any(row.params.min_p > 0 for row in rows):
        least_G = upload([log_min_p(row.params.min_p) for row in rows], torch.float32, y_GV.device)
        y_GV.masked_fill_(y_GV < least_G[:, None], float("-inf"))
    noise_GV = gumbel_(uniform_vocab(_keys(rows, y_GV.device), y_GV.shape[1]))
    return noise_GV.add_(y_GV).argmax(dim=1)


def _draw_ranked(y_GV: Tensor, rows: Sequence[SamplingRow], width: int) -> Tensor:
    """Ids [G] drawn from what top_k, min_p and top_p leave."""
    y_GW, id_GW = ranked(y_GV, width)
    device = y_GV.device
    keep_GW = surviving(
        y_GW,
        upload([row.params.top_k or width for row in rows], torch.int64, device),
        upload([log_min_p(row.params.min_p) for row in rows], torch.float32, device),
        upload([row.params.top_p if row.params.top_p < 1 else OFF_TOP_P for row in rows], torch.float64, device),
    )
    key_G, vocab_size = _keys(rows, device), y_GV.shape[1]
    # The same bits either way; hashing a whole vocabulary costs half as much a token.
    uniform_GW = uniform_at(key_G, id_GW) if width < vocab_size else uniform_vocab(key_G, vocab_size).gather(1, id_GW)
    noise_GW = gumbel_(uniform_GW)
    score_GW = noise_GW.add_(y_GW).masked_fill_(~keep_GW, float("-inf"))
    return id_GW.gather(1, score_GW.argmax(dim=1)[:, None])[:, 0]


def _keys(rows: Sequence[SamplingRow], device: torch.device) -> Tensor:
    keys = row_keys([row.params.seed for row in rows], [row.position for row in rows])
    return upload(keys, torch.int64, device)


def _with_logprobs(logits_RV: Tensor, code_R: Tensor, asking: Mapping[int, int]) -> list[SampledToken]:
    """``asking``: how many log probabilities each of these rows wants beside the drawn token's."""
    num_rows = logits_RV.shape[0]
    index_G = upload([*asking], torch.int64, logits_RV.device)
    most = max(asking.values())
    packed = packed_logprobs(logits_RV.index_select(0, index_G), code_R[index_G].clamp(min=0), most)
    host = torch.cat([code_R.to(torch.float64), packed.flatten()]).tolist()  # one copy, so one wait
    codes, flat = [int(code) for code in host[:num_rows]], host[num_rows:]
    tokens = [SampledToken(code) if code >= 0 else _failed(code) for code in codes]
    stride = packed.shape[1]
    for g, (r, k) in enumerate(asking.items()):
        if codes[r] >= 0:
            logprobs = unpack_logprobs(codes[r], flat[g * stride : (g + 1) * stride], k)
            tokens[r] = SampledToken(codes[r], logprobs)
    return tokens


def _failed(code: int) -> SampledToken:
    return SampledToken(NOTHING_DRAWN, error=_ERRORS[code])


def error_of(code: int) -> str:
    """What a negative code says, in words."""
    return _ERRORS[code]
