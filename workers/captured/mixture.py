"""Mixtures for a captured step: padding rows are counted nowhere, and a layout may change between two replays.

Legend: S rows of a graph, M model width, K experts per token, E logical experts, X most replicas of an expert.

A graph remembers addresses. Expert weights keep theirs (``replace_`` copies in place), but a layout is a value that a
switch replaces. So a graph reads tables of its own, as wide as any layout can be, into which the bank's present layout
is copied before a replay when it is another than the last one. Capturing anew instead would hold a step up for seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moestro.router.assign import Layout, assign
from moestro.router.transport import Transport
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import ExchangedMixture, ExpertBank, MoeMlp
from moestro.workers.model.sharding import token_shard
from moestro.workers.model.shared_expert import SharedExpert


class StaticLayout:
    """The tables of one bank's layout, at addresses that stay."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self._seen = layout = bank.layout
        num_ranks, num_experts = layout.placement.num_ranks, layout.turn_EX.shape[0]
        spare_slots = num_ranks * layout.placement.capacity - num_experts
        most = min(num_ranks, 1 + spare_slots)  # replicas that one expert may ever have
        turn_EX = layout.turn_EX.new_zeros(num_experts, most)
        turn_EX[:, : layout.turn_EX.shape[1]] = layout.turn_EX
        self.layout = replace(
            layout, slot_E=layout.slot_E.clone(), turn_EX=turn_EX, replicas_E=layout.replicas_E.clone()
        )

    def refresh_(self) -> None:
        """Takes on the bank's layout, if it is another. Does not wait for the device."""
        layout = self._bank.layout
        if layout is self._seen:
            return
        self.layout.slot_E.copy_(layout.slot_E)
        self.layout.turn_EX[:, : layout.turn_EX.shape[1]].copy_(layout.turn_EX)
        self.layout.replicas_E.copy_(layout.replicas_E)
        self._seen = layout


@dataclass(frozen=True, slots=True)
class PaddedLocalMixture:
    """``LocalMixture`` of a padded batch. Padding takes the experts of the first row, so that no weights are read for
    it which nobody needs."""

    bank: ExpertBank
    layout: Layout
    live_S: Tensor

    def forward(
        self,
        x_SM: Tensor,
        ids_SK: Tensor,
        weights_SK: Tensor,
        num_tokens_N: tuple[int, ...],
        shared: SharedExpert | None,
    ) -> Tensor:
        assigned_SK = assign(ids_SK, self.layout)
        live_S1 = self.live_S.unsqueeze(1)
        slots_SK = torch.where(live_S1 > 0, assigned_SK, assigned_SK[:1])
        y_SM, _ = self.bank.experts.mix(x_SM, slots_SK, weights_SK)
        self.bank.rows_L.scatter_add_(0, slots_SK.reshape(-1), live_S1.expand_as(slots_SK).reshape(-1))
        return y_SM if shared is None else y_SM + shared.forward(x_SM)


@dataclass(frozen=True, slots=True)
class PaddedExchangedMixture:
    """``ExchangedMixture`` of a padded batch. Padding is sent to nobody; what comes home for it is another row's."""

    bank: ExpertBank
    layout: Layout
    live_S: Tensor
    transport: Transport[Any]

    def forward(
        self,
        x_SM: Tensor,
        ids_SK: Tensor,
        weights_SK: Tensor,
        num_tokens_N: tuple[int, ...],
        shared: SharedExpert | None,
    ) -> Tensor:
        slots_SK = torch.where(self.live_S.unsqueeze(1) > 0, assign(ids_SK, self.layout), -1)
        arrival = self.transport.dispatch(x_SM, slots_SK, num_tokens_N)
        shared_SM = None if shared is None else shared.forward(x_SM)
        dispatched, handle = arrival()
        self.bank.rows_L += dispatched.counts_L
        y_RM = self.bank.experts.apply(dispatched.x_RD, dispatched.counts_L)
        y_SM = self.transport.combine(y_RM, weights_SK, handle)()
        return y_SM if shared_SM is None else y_SM + shared_SM


def static_layouts(decoder: Decoder) -> dict[int, StaticLayout]:
    """One for each mixture layer, for the graphs of every size."""
    return {index: StaticLayout(bank) for index, bank in decoder.banks.items()}


def padded(decoder: Decoder, layouts: dict[int, StaticLayout], live_S: Tensor) -> Decoder:
    """The same weights, for a batch of which ``live_S`` says which rows count."""
    layers = tuple(
        replace(layer, mlp=_padded(layer.mlp, layouts[index].layout, live_S))
        if isinstance(layer.mlp, MoeMlp)
        else layer
        for index, layer in enumerate(decoder.layers)
    )
    return decoder.with_layers(layers)


def _padded(mlp: MoeMlp, layout: Layout, live_S: Tensor) -> MoeMlp:
    mixture = mlp.mixture
    live_S = live_S[slice(*token_shard(live_S.shape[0], mlp.tp.rank, mlp.tp.size))]  # what this rank routes
    made: Any
    if isinstance(mixture, ExchangedMixture):
        made = PaddedExchangedMixture(mixture.bank, layout, live_S, mixture.transport)
    else:
        made = PaddedLocalMixture(mixture.bank, layout, live_S)
    return replace(mlp, mixture=made)
