"""Which experts a token needs, and with what weights.

Legend: T tokens, E experts, K experts per token, G groups of experts, n experts of a group, N numbers to be ordered.

Everything is computed in fp32 and row by row: what a token gets does not depend, in any bit, on the tokens beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moestro.kernels.activations import sigmoid

_MAX, _MIN = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
_EPSILON = 1e-20  # saves sigmoid scores that are all zero from 0 / 0; too small to change a sum of probabilities


class Score(Enum):
    """What makes a score of a logit."""

    SOFTMAX = "softmax"  # over all experts
    SIGMOID = "sigmoid"  # of each expert on its own


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Experts in ``num_groups`` contiguous groups of equal size, of at least 2. A token chooses among the experts of
    the ``top_k`` groups whose two best experts have the largest sum (DeepSeek-V3, section 2.1.2)."""

    num_groups: int
    top_k: int


@dataclass(frozen=True, slots=True)
class GateSpec:
    """``top_k`` of ``num_experts``. The groups that are kept must hold at least ``top_k`` experts.

    With ``has_bias`` each expert's score is raised by a correction for the choice, and the weights are made of the
    scores without it (auxiliary-loss-free balancing, Wang et al. 2024). ``renormalize`` divides the K weights by their
    sum, then ``scaling`` multiplies them. ``fp32_logits`` asks the model for logits that were computed in fp32,
    whatever dtype its weights have.
    """

    num_experts: int
    top_k: int
    renormalize: bool
    score: Score = Score.SOFTMAX
    has_bias: bool = False
    groups: GroupSpec | None = None
    scaling: float = 1.0
    fp32_logits: bool = False


def route(logits_TE: Tensor, bias_E: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """The K experts of each token, best first: ids_TK (int64, distinct) and weights_TK (fp32). ``bias_E`` is in fp32,
    and None without ``spec.has_bias``.

    Among equals the smaller id comes first, of groups too: ``topk`` alone promises no order, and two ranks must not
    disagree. A NaN among a token's scores counts as the largest: that token's first weight is NaN (all of them, when
    they are renormalised), its ids are as valid as any, and no other token notices.
    """
    if logits_TE.shape[0] == 0:  # of an idle rank; not every device's selection promises a result for no rows
        empty_TK = logits_TE.new_empty(0, spec.top_k, dtype=torch.float32)
        return empty_TK.to(torch.int64), empty_TK
    scores_TE = (
        torch.softmax(logits_TE, -1, dtype=torch.float32) if spec.score is Score.SOFTMAX else sigmoid(logits_TE.float())
    )
    choice_TE = scores_TE if bias_E is None else (scores_TE + bias_E).nan_to_num_(nan=torch.inf)
    signed = bias_E is not None
    keys_TE = _keys(choice_TE, signed)
    if spec.groups is not None:
        _drop_groups_(keys_TE, choice_TE, signed, spec.groups)
    ids_TK = keys_TE.topk(spec.top_k, -1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if spec.renormalize:
        weights_TK /= weights_TK.sum(-1, keepdim=True).add_(_EPSILON)
    if spec.scaling != 1.0:
        weights_TK *= spec.scaling
    return ids_TK, weights_TK


def _keys(scores_TN: Tensor, signed: bool) -> Tensor:
    """Integers of which no two of a row are equal, in the order of fp32 scores and, among equal ones, of ids downward.
    NaN is above all; with ``signed`` there must be none.

    The bits of a non-negative float sort like the float. A double that was an fp32 has 29 bits to spare for the id.
    """
    keys_TN = scores_TN.double().view(torch.int64)
    if signed:  # the bits of negative floats sort the other way round
        keys_TN ^= (keys_TN >> 63).bitwise_and_(_MAX)
    else:  # only a NaN can have a sign
        keys_TN &= _MAX
    keys_TN -= torch.arange(scores_TN.shape[-1], device=scores_TN.device)
    return keys_TN


def _drop_groups_(keys_TE: Tensor, choice_TE: Tensor, signed: bool, groups: GroupSpec) -> None:
    """Puts the keys of experts outside the chosen groups below all others."""
    num_tokens, num_experts = keys_TE.shape
    shape = (num_tokens, groups.num_groups, num_experts // groups.num_groups)
    sums_TG = choice_TE.view(shape).topk(2, -1).values.sum(-1)
    group_keys_TG = _keys(sums_TG, signed)
    least_T1 = group_keys_TG.topk(groups.top_k, -1).values[:, -1:]
    keys_TE.view(shape).masked_fill_((group_keys_TG < least_T1).unsqueeze(-1), _MIN)
