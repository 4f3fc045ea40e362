"""An engine that is invariant by construction, and one with a planted dependence on the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from moestro.kernels.linear import Linear
from moestro.workers.batch import Batch, CacheTables
from moestro.workers.hidden_trace import HiddenTrace
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Model


class Hidden(HiddenTrace):
    """Keeps the hidden states themselves."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def take(self, x_TM: Tensor) -> None:
        self.layers.append(x_TM)


@dataclass
class TokenByToken:
    """Every token of a step is computed alone, so no kernel can see how many there are. In the order of positions: a
    token may read a block that another sequence fills in the same step, at an earlier position."""

    decoder: Decoder
    num_tokens: int = field(default=0, init=False)  # of the step

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        self.num_tokens = batch.num_tokens
        lengths = torch.tensor(batch.query_start_S1).diff()
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths).tolist()
        logits: dict[int, Tensor] = {}
        hidden: dict[int, list[Tensor]] = {}
        for row in sorted(range(batch.num_tokens), key=batch.positions_T.tolist().__getitem__):
            seen = Hidden()
            logits[row] = self.decoder.forward(replace(_alone(batch, row, sequence_T[row]), trace=seen), cache)
            hidden[row] = seen.layers
        if batch.trace is not None:
            for layer in range(len(self.decoder.layers)):
                batch.trace.take(torch.cat([hidden[row][layer] for row in range(batch.num_tokens)]))
        wanted = [logits[row] for row in batch.logit_rows_R.tolist()]
        return torch.cat(wanted) if wanted else torch.empty(0, self.decoder.config.vocab_size)


def _alone(batch: Batch, row: int, sequence: int) -> Batch:
    here = slice(row, row + 1)
    return Batch(
        token_ids_T=batch.token_ids_T[here],
        positions_T=batch.positions_T[here],
        query_start_S1=(0, 1),
        context_len_S=(int(batch.positions_T[row]) + 1,),
        num_decodes=1,
        tables_G=tuple(
            CacheTables(tables.block_table_SB[sequence : sequence + 1], tables.slot_T[here])
            for tables in batch.tables_G
        ),
        logit_rows_R=torch.zeros(1, dtype=torch.int64),
        num_tokens_N=(1,),
    )


@dataclass(frozen=True)
class TiledByBatch:
    """y = x W^T + b, summed in one run, or in two halves where there are more than four rows: a tile size that depends
    on the batch."""

    whole: Linear
    num_rows: Callable[[Tensor], int]

    @property
    def out_features(self) -> int:
        return self.whole.out_features

    def apply(self, x_TI: Tensor) -> Tensor:
        if self.num_rows(x_TI) <= 4:
            return self.whole.apply(x_TI)
        left_TI, right_TI = x_TI.clone(), x_TI.clone()
        left_TI[:, x_TI.shape[1] // 2 :] = 0
        right_TI[:, : x_TI.shape[1] // 2] = 0
        bias_TO = self.whole.apply(torch.zeros_like(x_TI))
        return self.whole.apply(left_TI) + self.whole.apply(right_TI) - bias_TO


def invariant(model: Model) -> Model:
    return TokenByToken(cast(Decoder, model))


def planted(model: Model, in_layer: int) -> Model:
    """An invariant engine, but that the output projection of one layer's attention depends on the batch."""
    engine = TokenByToken(cast(Decoder, model))
    engine.decoder = _with_tiles(engine.decoder, in_layer, lambda _: engine.num_tokens)
    return engine


def planted_in_kernel(model: Model, in_layer: int) -> Model:
    """The model itself with the same fault: the product looks at its own rows."""
    return _with_tiles(cast(Decoder, model), in_layer, lambda x_TI: x_TI.shape[0])


def _with_tiles(decoder: Decoder, in_layer: int, num_rows: Callable[[Tensor], int]) -> Decoder:
    layers = list(decoder.layers)
    attention = layers[in_layer].attention
    faulty = replace(attention, out=TiledByBatch(attention.out, num_rows))
    layers[in_layer] = replace(layers[in_layer], attention=faulty)
    return decoder.with_layers(tuple(layers))
