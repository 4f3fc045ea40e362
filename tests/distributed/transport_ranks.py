"""What each rank does in test_transport: runs in processes of its own."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.router import stand_in_deep_ep
from tests.router.cases import (
    CASES,
    Case,
    any_slots,
    expert_layer,
    expert_weights,
    make_tokens,
    reference,
    replicated,
)
from torch import Tensor

from moestro.kernels.grouped_experts import GroupedExperts, mix_sorted
from moestro.router.expert_parallel import over_group
from moestro.router.mesh import Mesh, MeshTensorParallel, StoreAddress, join
from moestro.router.parallel import GroupShape
from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.transport import Arrival, Dispatched, LocalTransport, Transport
from moestro.router.transports.all_to_all import AllToAllTransport
from moestro.router.transports.choose import TransportKind
from moestro.router.transports.deep_ep import DeepEPTransport
from moestro.router.transports.fixed_capacity import FixedCapacityTransport
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import MoeMlp

KINDS: dict[str, Callable[[Mesh, int], Transport[Any]]] = {
    "all_to_all": lambda mesh, capacity: AllToAllTransport(mesh.world, capacity),
    "gather_scatter": lambda mesh, capacity: GatherScatterTransport(mesh.world, capacity),
    "fixed_capacity": lambda mesh, capacity: FixedCapacityTransport(mesh.world, capacity),
    "deep_ep, stand-in": lambda mesh, capacity: DeepEPTransport(mesh.control, capacity, 24),
}


def check(
    rank: int, world_size: int, address: StoreAddress, shapes: list[tuple[int, int]], kind: str, num_seeds: int
) -> list[int]:
    """Every shape in turn, each in an epoch of its own, by its first ranks: how many layers each has compared."""
    sys.modules["deep_ep"] = stand_in_deep_ep
    compared = []
    for epoch, (dp, tp) in enumerate(shapes):
        if rank < dp * tp:
            with join(GroupShape(dp, tp), rank, address.connect(30), epoch=epoch, timeout_s=30) as mesh:
                layers = [*_table(mesh.shape.world_size), *_random_layers(mesh.shape.world_size, num_seeds)]
                for number, layer in enumerate(layers):
                    # DeepEP carries nothing else.
                    dtype = torch.bfloat16 if number % 2 or "deep_ep" in kind else torch.float32
                    _check_layer(mesh, kind, dtype, *layer)
                compared.append(len(layers))
    return compared


Layer = tuple[str, Case, tuple[int, ...], Placement, int]
"""name, case, tokens of each rank, placement, seed of the slots."""


def _table(size: int) -> Iterator[Layer]:
    for case in CASES:
        num_tokens = tuple(case.tokens_per_rank(size))
        yield f"{case.name}, spread", case, num_tokens, spread(case.num_experts, size), 0
        yield f"{case.name}, replicated", case, num_tokens, replicated(case.num_experts, size, 3), 3
    # Experts in no order over ranks, as a rebalancer would leave them, and all on the last rank at the extreme.
    order = torch.randperm(CASES[5].num_experts, generator=torch.Generator().manual_seed(3)).tolist()
    dealt = [order[r::size] for r in range(size)]
    scattered = tuple(tuple(experts + [EMPTY] * (len(dealt[0]) - len(experts))) for experts in dealt)
    last = ((EMPTY,) * len(order),) * (size - 1) + (tuple(order),)
    for name, slots in (("scattered", scattered), ("all on the last rank", last)):
        placement = Placement(CASES[5].num_experts, slots)
        yield name, CASES[5], tuple(CASES[5].tokens_per_rank(size)), placement, 0


def _random_layers(size: int, num_seeds: int) -> Iterator[Layer]:
    for seed in range(num_seeds):
        rng = random.Random(seed)
        num_experts = rng.choice((1, 2, 3, 5, 8, 17))
        k = rng.randint(1, min(num_experts, 6))
        case = Case(f"seed {seed}", num_experts, k, "many", rng.choice(("random", "last_experts")))
        num_tokens = tuple(rng.choice((0, 0, 1, 2, 7, 20)) for _ in range(size))
        yield f"random layer, seed {seed}", case, num_tokens, replicated(num_experts, size, seed), seed


def _check_layer(
    mesh: Mesh,
    kind: str,
    dtype: torch.dtype,
    name: str,
    case: Case,
    num_tokens: tuple[int, ...],
    placement: Placement,
    seed: int,
) -> None:
    """Equal to the dense reference, and to the bit what one rank computes."""
    transport, what = KINDS[kind](mesh, placement.capacity), f"{kind}, {name}, {dtype}"
    x_TD, ids_TK, w_TK = make_tokens(case, mesh.rank, num_tokens[mesh.rank], dtype)
    slots_TK = any_slots(ids_TK, placement, seed)
    weights_EDD = expert_weights(case.num_experts, dtype)
    y_TD = expert_layer(transport, placement.slots[mesh.rank], num_tokens, x_TD, slots_TK, w_TK, weights_EDD)
    alone, here = LocalTransport(case.num_experts), tuple(range(case.num_experts))
    alone_TD = expert_layer(alone, here, (len(x_TD),), x_TD, ids_TK, w_TK, weights_EDD)
    assert y_TD.dtype == dtype
    assert torch.equal(y_TD, alone_TD), f"{what}: differs from one rank's"
    expected_TD = reference(x_TD, ids_TK, w_TK, weights_EDD)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")
    # Each pair is computed exactly once in the group, in the slot that was named for it.
    dispatched, handle = transport.dispatch(x_TD, slots_TK, num_tokens)()
    assert int(dispatched.counts_L.sum()) <= dispatched.x_RD.shape[0]
    mine = torch.bincount(slots_TK.flatten(), minlength=placement.num_slots)
    told = mesh.control.all_gather(torch.cat((dispatched.counts_L, mine)))
    computed, named = told[:, : placement.capacity].flatten(), told[:, placement.capacity :].sum(0)
    assert torch.equal(computed, named), f"{what}: rows by slot"
    transport.combine(dispatched.x_RD, w_TK, handle)()


def check_refusals(rank: int, world_size: int, address: StoreAddress) -> int:
    """A rank that sends other than it said is told so before anything is sent; the group is as good as before."""
    sys.modules["deep_ep"] = stand_in_deep_ep
    x_TD, slots_TK = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)
    slots_TK[:, 1] = 1
    with join(GroupShape(world_size), rank, address.connect(30), timeout_s=30) as mesh:
        for make in KINDS.values():
            transport = make(mesh, 2)
            with pytest.raises(ValueError, match=rf"num_tokens_N\[{rank}\] is 2, but rank {rank} dispatches 3 tokens"):
                transport.dispatch(x_TD, slots_TK, (2,) * world_size)
            with pytest.raises(ValueError, match=f"an entry for each of {world_size} ranks, got 1"):
                transport.dispatch(x_TD, slots_TK, (3,))
            arrived, _ = transport.dispatch(x_TD, slots_TK, (3,) * world_size)()
            assert arrived.counts_L.tolist() == ([3 * world_size] * 2 if rank == 0 else [0, 0])
    return len(KINDS)


@dataclass(frozen=True, slots=True)
class OneRowAtATime:
    """Experts whose rows do not know each other."""

    experts: GroupedExperts

    def apply(self, x_RD: Tensor, counts_L: Tensor) -> Tensor:
        ends, y_RD = counts_L.cumsum(0).tolist(), torch.full_like(x_RD, float("nan"))
        for slot, (start, end) in enumerate(pairwise([0, *ends])):
            for row in range(start, end):
                only = torch.zeros_like(counts_L)
                only[slot] = 1
                y_RD[row] = self.experts.apply(x_RD[row : row + 1].clone(), only)[0]
        return y_RD

    def mix(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        return mix_sorted(self, len(self.experts.expert_L), x_TD, slots_TK, weights_TK)


@dataclass(frozen=True, slots=True)
class Counted(Transport[Any]):
    """Counts its dispatches."""

    inner: Transport[Any]
    calls: list[int] = field(default_factory=list)

    def num_parts(self, num_tokens_N: tuple[int, ...]) -> int:
        return self.inner.num_parts(num_tokens_N)

    def dispatch(
        self, x_TD: Tensor, slots_TK: Tensor, num_tokens_N: tuple[int, ...]
    ) -> Arrival[tuple[Dispatched, Any]]:
        self.calls.append(len(x_TD))
        return self.inner.dispatch(x_TD, slots_TK, num_tokens_N)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, handle: Any) -> Arrival[Tensor]:
        return self.inner.combine(y_RD, weights_TK, handle)


def unwatched(first_token: int, weights_tK: torch.Tensor) -> None:
    """Nobody asks what the gate says."""


def check_mixture_layer(rank: int, world_size: int, address: StoreAddress, model: str) -> dict[str, Any]:
    """The first mixture layer over the group, at once and in halves, against the same layer with all experts here."""
    whole = load_model(model, dtype=torch.float32)
    config, alone = whole.config, _mixture_layer(whole)
    alone.bank.experts = OneRowAtATime(alone.bank.experts)
    seen: dict[str, Any] = {"kinds": [], "dispatches": {}}
    kinds: list[TransportKind | None] = ["all_to_all", "fixed_capacity", "gather_scatter", None]
    with join(GroupShape(world_size), rank, address.connect(30), timeout_s=30) as mesh, torch.inference_mode():
        for kind in kinds:
            for two_batches_from in (None, 2):
                placements = (spread(config.num_experts, world_size),) * config.num_moe_layers
                experts = over_group(mesh, placements, transport=kind, two_batches_from=two_batches_from)
                layer = _mixture_layer(load_model(model, dtype=torch.float32, experts=experts))
                layer.bank.experts = OneRowAtATime(layer.bank.experts)
                counted = Counted(experts.transport)
                layer = replace(layer, mixture=replace(layer.mixture, transport=counted))
                for num_tokens in ((5, 0, 2), (1, 1, 1), (0, 0, 0), (0, 9, 1)):
                    generator = torch.Generator().manual_seed(rank + 10 * sum(num_tokens))
                    x_TM = torch.randn(num_tokens[rank], config.hidden_size, generator=generator)
                    y_TM = layer.forward(x_TM, num_tokens, unwatched)
                    assert torch.equal(y_TM, alone.forward(x_TM, (len(x_TM),), unwatched)), (
                        kind,
                        two_batches_from,
                        num_tokens,
                    )
                    if num_tokens == (5, 0, 2):
                        seen["dispatches"][str(two_batches_from or 1)] = len(counted.calls)
                seen |= {"wait_s": layer.bank.wait_s, "compute_s": layer.bank.compute_s}
            seen["kinds"].append(kind or "none")
    return seen


def _mixture_layer(decoder: Decoder) -> MoeMlp:
    return next(layer.mlp for layer in decoder.layers if isinstance(layer.mlp, MoeMlp))


def overlap(rank: int, world_size: int, address: StoreAddress) -> list[float]:
    """With a peer that comes late: seconds that dispatch took, and then its arrival, by gather and scatter."""
    x_TD, slots_TK = torch.zeros(3, 4), torch.arange(2).repeat(3, 1)
    with join(GroupShape(world_size), rank, address.connect(30), timeout_s=30) as mesh:
        transport = GatherScatterTransport(mesh.world, 2)
        transport.dispatch(x_TD, slots_TK, (3,) * world_size)()
        mesh.control.all_gather(torch.zeros(1))
        if rank == 1:
            time.sleep(1.0)
        start = time.perf_counter()
        arriving = transport.dispatch(x_TD, slots_TK, (3,) * world_size)
        sent = time.perf_counter()
        arriving()
        return [sent - start, time.perf_counter() - sent]


def check_tensor_parallel(rank: int, world_size: int, address: StoreAddress) -> None:
    """Sum and gather of a set of every size."""
    for epoch, tp in enumerate(size for size in (2, 3, 4) if size <= world_size):
        if rank < tp:
            with join(GroupShape(1, tp), rank, address.connect(30), epoch=epoch, timeout_s=30) as mesh:
                _check_set(mesh)


def _check_set(mesh: Mesh) -> None:
    tp, size = mesh.tp, mesh.tp.size
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (0, 1, 5):
            parts = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
            mine = parts[tp.rank]
            total = sum((part.float() for part in parts[1:]), parts[0].float()).to(dtype)
            assert torch.equal(tp.sum(mine), total)
            assert torch.equal(tp.gather(mine), torch.cat(parts, dim=-1))
            assert torch.equal(tp.gather(mine, dim=0), torch.cat(parts, dim=0))
            assert torch.equal(tp.sum(mine.T), total.T), "a transposed tensor"
    assert isinstance(tp, MeshTensorParallel)
    assert (tp.rank, size) == (mesh.shape.tp_rank(mesh.rank), mesh.shape.tp)


def check_epochs(rank: int, world_size: int, address: StoreAddress) -> list[list[int]]:
    """A group of a later epoch forms on the same store while the first is open, and outlives it."""
    shape, me = GroupShape(world_size), torch.tensor([rank])
    first = join(shape, rank, address.connect(30), epoch=7, timeout_s=30)
    later = join(shape, rank, address.connect(30), epoch=8, timeout_s=30)
    seen = [later.world.all_gather(me), first.world.all_gather(me)]
    first.close()
    seen.append(later.world.all_gather(me))
    with pytest.raises(RuntimeError, match="this process group is closed"):
        first.world.all_gather(me)
    if rank == 0:
        later.close()
    else:  # a peer that left is noticed at once, long before the timeout
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="Connection"):
            later.world.all_gather(me)
        assert time.monotonic() - started < 5
    return [ranks.flatten().tolist() for ranks in seen]
