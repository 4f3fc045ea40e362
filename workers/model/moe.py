"""A mixture of experts: gate, dispatch, experts, combine.

Legend: T tokens, t this rank's share of them, M model width, K experts per token, E experts.

With tensor parallelism all ranks of a set hold the same tokens. Each routes its own contiguous share of them, so that
no row crosses the wire twice, and the results are gathered within the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.kernels.activations import sigmoid
from moestro.kernels.grouped_experts import GroupedExperts, make_experts
from moestro.kernels.linear import Linear
from moestro.router.gate import softmax_topk
from moestro.router.parallel import NoTensorParallel, TensorParallel
from moestro.router.transport import Transport
from moestro.workers.model.mlp import DenseMlp, build_mlp
from moestro.workers.model.sharding import token_shard
from moestro.workers.model.weights import WeightSource, read_linear
from moestro.workers.model_config import DenseSpec, GateSpec, MoeSpec


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert for every token, scaled by the sigmoid of its own gate. Held whole on every rank: it works on the
    rank's own share of the tokens."""

    mlp: DenseMlp
    gate: Linear

    def forward(self, x_tM: Tensor) -> Tensor:
        return sigmoid(self.gate.apply(x_tM)) * self.mlp.forward(x_tM)


@dataclass(frozen=True, slots=True)
class MoeMlp:
    """One mixture layer on one rank."""

    spec: GateSpec
    gate: Linear
    experts: GroupedExperts
    shared: SharedExpert | None
    transport: Transport[Any]
    tp: TensorParallel

    def forward(self, x_TM: Tensor) -> Tensor:
        """y_TM. Collective within the whole group: to be called with zero tokens too."""
        if self.tp.size == 1:
            return self._route(x_TM)
        start, stop = token_shard(x_TM.shape[0], self.tp.rank, self.tp.size)
        return _gather_tokens(self._route(x_TM[start:stop]), x_TM.shape[0], self.tp)

    def _route(self, x_tM: Tensor) -> Tensor:
        ids_tK, weights_tK = softmax_topk(self.gate.apply(x_tM), self.spec.top_k, self.spec.renormalize)
        dispatched, handle = self.transport.dispatch(x_tM, ids_tK)
        y_RM = self.experts.apply(dispatched.x_RD, dispatched.counts_L)
        y_tM = self.transport.combine(y_RM, weights_tK, handle)
        return y_tM if self.shared is None else y_tM + self.shared.forward(x_tM)


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


def build_moe(
    spec: MoeSpec,
    hidden_size: int,
    prefix: str,
    source: WeightSource,
    tp: TensorParallel,
    transport: Transport[Any],
) -> MoeMlp:
    """Reads the gate, the shared expert and this rank's experts."""
    local_experts = transport.local_experts

    def fill(index: int, gate_up_2WM: Tensor, down_MW: Tensor) -> None:
        expert = f"{prefix}experts.{local_experts[index]}."
        source.read_(gate_up_2WM[: spec.width], expert + "gate_proj.weight")
        source.read_(gate_up_2WM[spec.width :], expert + "up_proj.weight")
        source.read_(down_MW, expert + "down_proj.weight")

    gate = read_linear(source, prefix + "gate.weight", spec.gate.num_experts, hidden_size)
    experts = make_experts(len(local_experts), spec.width, hidden_size, source.dtype, source.device, fill)
    shared = None
    if spec.shared_width is not None:
        mlp = build_mlp(
            DenseSpec(spec.shared_width), hidden_size, prefix + "shared_expert.", source, NoTensorParallel()
        )
        shared = SharedExpert(mlp, read_linear(source, prefix + "shared_expert_gate.weight", 1, hidden_size))
    return MoeMlp(spec.gate, gate, experts, shared, transport, tp)
