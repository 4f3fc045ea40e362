"""Token embedding and LM head, split over the vocabulary.

Legend: T tokens, R rows whose logits are wanted, M model width, V vocabulary, v this rank's share of it (padded, so
that all shares are equal).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from moestro.kernels.linear import Linear, PlainLinear
from moestro.router.parallel import TensorParallel
from moestro.workers.model.weights import WeightSource


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of the table that belong to this rank's token ids."""

    weight_vM: Tensor
    first: int
    tp: TensorParallel

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """x_TM. Collective within the tensor-parallel set."""
        if self.tp.size == 1:
            return embedding(token_ids_T, self.weight_vM)
        local_T = token_ids_T - self.first
        here_T = (local_T >= 0) & (local_T < self.weight_vM.shape[0])
        x_TM = embedding(local_T.where(here_T, 0), self.weight_vM)
        return self.tp.sum(x_TM.where(here_T.unsqueeze(1), 0))  # zero also where a row of ours is not finite


@dataclass(frozen=True, slots=True)
class LMHead:
    """Logits over the whole vocabulary."""

    linear: Linear
    vocab_size: int
    tp: TensorParallel

    def forward(self, x_RM: Tensor) -> Tensor:
        """logits_RV in fp32. Collective within the tensor-parallel set."""
        return self.tp.gather(self.linear.apply(x_RM))[:, : self.vocab_size].float()


def build_vocabulary(
    vocab_size: int, hidden_size: int, tied: bool, source: WeightSource, tp: TensorParallel
) -> tuple[Embedding, LMHead]:
    """Reads this rank's rows. A tied table is held once, and therefore not repacked for the head."""
    share = -(-vocab_size // tp.size)
    first = tp.rank * share
    weight_vM = torch.empty(share, hidden_size, dtype=source.dtype, device=source.device)
    _read_rows(weight_vM, "model.embed_tokens.weight", first, vocab_size, source)
    if tied:
        linear: Linear = PlainLinear(weight_vM)
    else:
        head_vM = source.backend.empty_weight(share, hidden_size, source.dtype, source.device)
        _read_rows(head_vM, "lm_head.weight", first, vocab_size, source)
        linear = source.backend.make_linear(head_vM)
    return Embedding(weight_vM, first, tp), LMHead(linear, vocab_size, tp)


def _read_rows(out_vM: Tensor, name: str, first: int, vocab_size: int, source: WeightSource) -> None:
    num_rows = max(0, min(len(out_vM), vocab_size - first))
    out_vM[num_rows:].zero_()
    if num_rows:
        source.read_(out_vM[:num_rows], name, row=first)
