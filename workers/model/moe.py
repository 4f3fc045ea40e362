"""A mixture of experts: gate, assign, dispatch, experts, combine.

Legend: T tokens, t this rank's share of them, M model width, K experts per token, N ranks of the group, W expert width,
L slots of this rank.

With tensor parallelism all ranks of a set hold the same tokens. Each routes its own contiguous share of them, so that
no row crosses the wire twice, and the results are gathered within the set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from moestro.kernels.grouped_experts import ExpertShape, Fill, GroupedExperts
from moestro.router.assign import Layout, assign, lay_out
from moestro.router.expert_parallel import ExpertParallel
from moestro.router.parallel import TensorParallel
from moestro.router.placement import EMPTY
from moestro.router.transport import Arrival, Transport
from moestro.workers.model.gate import Gate, build_gate
from moestro.workers.model.sharding import token_shard
from moestro.workers.model.shared_expert import SharedExpert, build_shared_expert
from moestro.workers.model.weights import WeightSource
from moestro.workers.model_config import MoeSpec

Arrived = TypeVar("Arrived")

SawGate = Callable[[int, Tensor], None]
"""Told the weights that the gate gave to the tokens from a row on; see ``health.py``."""


class ExpertBank:
    """One mixture layer's experts on this rank and the layout that says where all of them are: the only part of a
    model that changes while it serves. The two change together, between two steps.

    What a rank holds outlives a group, the layout does not: a bank without one waits to be placed in its first group,
    and between two groups its slots are changed one by one."""

    def __init__(self, prefix: str, experts: GroupedExperts, held: Sequence[int], layout: Layout | None = None) -> None:
        self.prefix = prefix  # of the layer's weights, "model.layers.3.mlp."
        self.experts = experts
        self.held = tuple(held)
        """By slot the logical expert that is in it, or EMPTY: at any moment what is true."""
        self._layout = layout
        self.rows_L = torch.zeros(len(self.held), dtype=torch.int64, device=experts.shape.device)
        """Rows that each slot has computed."""
        self.wait_s = self.compute_s = 0.0
        """Seconds the host has waited for rows, there and back, and spent on the experts. On CUDA they say how long the
        host was held up and not how long the device took."""

    @property
    def layout(self) -> Layout:
        """Where all experts are. Raises RuntimeError for a bank that has not been placed in a group."""
        if self._layout is None:
            raise RuntimeError(f"{self.prefix}experts: this rank has not joined a group yet")
        return self._layout

    def place_(self, layout: Layout) -> None:
        """Takes on a layout, with counters that begin anew. Raises ValueError when it says something else of this rank
        than what is held."""
        if layout.local_experts != self.held:
            raise ValueError(f"{self.prefix}experts: the slots hold {self.held}, not {layout.local_experts}")
        self._layout = layout
        self.rows_L = torch.zeros_like(self.rows_L)

    def awaited(self, arrival: Arrival[Arrived]) -> Arrived:
        """What arrives."""
        start = perf_counter()
        arrived = arrival()
        self.wait_s += perf_counter() - start
        return arrived

    def apply(self, x_RM: Tensor, counts_L: Tensor) -> Tensor:
        """The experts' results for rows sorted by slot."""
        start = perf_counter()
        self.rows_L += counts_L
        y_RM = self.experts.apply(x_RM, counts_L)
        self.compute_s += perf_counter() - start
        return y_RM

    def mix(self, x_TM: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """y_TM of tokens all of whose experts are here."""
        start = perf_counter()
        y_TM, counts_L = self.experts.mix(x_TM, slots_TK, weights_TK)
        self.rows_L += counts_L
        self.compute_s += perf_counter() - start
        return y_TM

    def switch_(self, layout: Layout, staged: Mapping[int, Any]) -> None:
        """Takes on a new layout. ``staged`` holds, by local slot, what ``experts.stage`` made of every expert that
        the slot did not hold before."""
        for slot, expert in staged.items():
            self.experts.replace_(slot, expert)
        self._layout, self.held = layout, layout.local_experts

    def resize_(self, sources: Sequence[int | None]) -> None:
        """As many slots as ``sources`` has, each with what is now in the slot that it names, or empty. Between groups:
        there is no layout until ``place_`` brings one."""
        self._layout = None
        experts = self.experts.with_slots(sources)
        self.experts, self.held = experts, tuple(EMPTY if s is None else self.held[s] for s in sources)
        self.rows_L = self.rows_L.new_zeros(len(sources))

    def load_(self, slot: int, expert: int, source: WeightSource) -> None:
        """Reads an expert into an empty slot, between groups. Raises what the source raises; then it stays empty."""
        self.experts.replace_(slot, self.experts.stage(expert_fill(source, self.prefix, expert)))
        self.held = (*self.held[:slot], expert, *self.held[slot + 1 :])


@dataclass(frozen=True, slots=True)
class UnplacedMixture:
    """Experts of a rank that has not joined a group: nothing can be computed."""

    bank: ExpertBank

    def forward(
        self,
        x_tM: Tensor,
        ids_tK: Tensor,
        weights_tK: Tensor,
        num_tokens_N: tuple[int, ...],
        shared: SharedExpert | None,
    ) -> Tensor:
        raise RuntimeError(f"{self.bank.prefix}experts: this rank has not joined a group yet")


@dataclass(frozen=True, slots=True)
class LocalMixture:
    """Every expert on this rank."""

    bank: ExpertBank

    def forward(
        self,
        x_tM: Tensor,
        ids_tK: Tensor,
        weights_tK: Tensor,
        num_tokens_N: tuple[int, ...],
        shared: SharedExpert | None,
    ) -> Tensor:
        y_tM = self.bank.mix(x_tM, assign(ids_tK, self.bank.layout), weights_tK)
        return y_tM if shared is None else y_tM + shared.forward(x_tM)


@dataclass(frozen=True, slots=True)
class ExchangedMixture:
    """Experts over all ranks of the group."""

    bank: ExpertBank
    transport: Transport[Any]

    def forward(
        self,
        x_tM: Tensor,
        ids_tK: Tensor,
        weights_tK: Tensor,
        num_tokens_N: tuple[int, ...],
        shared: SharedExpert | None,
    ) -> Tensor:
        """Collective within the whole group: to be called with zero tokens too. ``num_tokens_N`` is what each rank
        routes (see ``token_shares``), the same on all."""
        slots_tK = assign(ids_tK, self.bank.layout)
        num_parts = self.transport.num_parts(num_tokens_N)
        shards = [slice(*token_shard(x_tM.shape[0], part, num_parts)) for part in range(num_parts)]
        arriving = [
            self.transport.dispatch(x_tM[shard], slots_tK[shard], _part_of(num_tokens_N, part, num_parts))
            for part, shard in enumerate(shards)
        ]
        # Computed while the rows travel.
        shared_tM = None if shared is None else shared.forward(x_tM)
        returning = []
        for shard, arrival in zip(shards, arriving, strict=True):
            dispatched, handle = self.bank.awaited(arrival)
            y_RM = self.bank.apply(dispatched.x_RD, dispatched.counts_L)
            # Travels home while the experts of the next part are computed.
            returning.append(self.transport.combine(y_RM, weights_tK[shard], handle))
        returned = [self.bank.awaited(arrival) for arrival in returning]
        y_tM = returned[0] if num_parts == 1 else torch.cat(returned)
        return y_tM if shared_tM is None else y_tM + shared_tM


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """One mixture layer on one rank."""

    gate: Gate
    mixture: UnplacedMixture | LocalMixture | ExchangedMixture
    shared: SharedExpert | None
    tp: TensorParallel

    @property
    def bank(self) -> ExpertBank:
        return self.mixture.bank

    def over(self, parallel: ExpertParallel, index: int) -> MoeMlp:
        """The same layer, mixture layer ``index`` of its model, over a group. Its bank must hold what the placement
        says of this rank, and is the new layer's from now on."""
        bank = self.bank
        bank.place_(lay_out(parallel.placements[index], parallel.rank, bank.rows_L.device, parallel.node_of_rank))
        alone = bank.layout.placement.num_ranks == 1
        return replace(self, mixture=LocalMixture(bank) if alone else ExchangedMixture(bank, parallel.transport))

    def forward(self, x_TM: Tensor, num_tokens_N: tuple[int, ...], saw_gate: SawGate) -> Tensor:
        """y_TM. Collective within the whole group: to be called with zero tokens too. ``num_tokens_N`` is what each
        rank routes (see ``token_shares``), the same on all."""
        if self.tp.size == 1:
            return self._route(x_TM, num_tokens_N, partial(saw_gate, 0))
        start, stop = token_shard(x_TM.shape[0], self.tp.rank, self.tp.size)
        y_tM = self._route(x_TM[start:stop], num_tokens_N, partial(saw_gate, start))
        return _gather_tokens(y_tM, x_TM.shape[0], self.tp)

    def _route(self, x_tM: Tensor, num_tokens_N: tuple[int, ...], saw_weights: Callable[[Tensor], None]) -> Tensor:
        ids_tK, weights_tK = self.gate.route(x_tM)
        saw_weights(weights_tK)
        return self.mixture.forward(x_tM, ids_tK, weights_tK, num_tokens_N, self.shared)


def _part_of(num_tokens_N: tuple[int, ...], part: int, num_parts: int) -> tuple[int, ...]:
    """Of every rank's tokens those of one part."""
    if num_parts == 1:
        return num_tokens_N
    shards = (token_shard(num_tokens, part, num_parts) for num_tokens in num_tokens_N)
    return tuple(stop - start for start, stop in shards)


def _gather_tokens(y_tM: Tensor, num_tokens: int, tp: TensorParallel) -> Tensor:
    """All shares of ``token_shard``, in order. Shorter ones travel padded, since a gather wants equal shapes."""
    if num_tokens == 0:
        return y_tM
    longest = -(-num_tokens // tp.size)
    padded_tM = torch.cat((y_tM, y_tM.new_zeros(longest - y_tM.shape[0], y_tM.shape[1])))
    all_XM = tp.gather(padded_tM, dim=0)
    if num_tokens % tp.size == 0:
        return all_XM
    shards = (token_shard(num_tokens, rank, tp.size) for rank in range(tp.size))
    return torch.cat([all_XM[r * longest : r * longest + stop - start] for r, (start, stop) in enumerate(shards)])


def expert_fill(source: WeightSource, prefix: str, expert: int) -> Fill:
    """Reads one logical expert of the layer whose weights begin with ``prefix``."""

    def fill(gate_up_2WM: Tensor, down_MW: Tensor) -> None:
        width = down_MW.shape[1]
        name = f"{prefix}experts.{expert}."
        source.read_(gate_up_2WM[:width], name + "gate_proj.weight")
        source.read_(gate_up_2WM[width:], name + "up_proj.weight")
        source.read_(down_MW, name + "down_proj.weight")

    return fill


def build_moe(
    spec: MoeSpec,
    hidden_size: int,
    prefix: str,
    source: WeightSource,
    tp: TensorParallel,
    held: Sequence[int],
) -> MoeMlp:
    """Reads the gate, the shared expert and the experts ``held``, one a slot; EMPTY leaves it empty."""
    gate = build_gate(spec.gate, hidden_size, prefix + "gate.", source)
    experts = source.backend.make_experts(
        ExpertShape(spec.width, hidden_size, source.dtype, source.device),
        [None if expert == EMPTY else expert_fill(source, prefix, expert) for expert in held],
        room=spec.gate.num_experts,
    )
    shared = None if spec.shared is None else build_shared_expert(spec.shared, hidden_size, prefix, source)
    return MoeMlp(gate, UnplacedMixture(ExpertBank(prefix, experts, held)), shared, tp)
