"""What each rank does in test_transport: runs in processes of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.router.cases import CASES, expert_layer, expert_weights, make_tokens, reference

from moestro.router.assign import assign, lay_out
from moestro.router.mesh import Mesh, MeshTensorParallel, StoreAddress, join
from moestro.router.parallel import GroupShape
from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.transport import LocalTransport
from moestro.router.transports.all_to_all import AllToAllTransport


def check(rank: int, world_size: int, address: StoreAddress, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Every shape in turn, each in an epoch of its own, by the first ``dp * tp`` ranks."""
    results = []
    for epoch, (dp, tp) in enumerate(shapes):
        if rank < dp * tp:
            with join(GroupShape(dp, tp), rank, address.connect(30), epoch=epoch, timeout_s=30) as mesh:
                results.append({"checked": _check(mesh), "microseconds": _timings(mesh)})
    return results


def _check(mesh: Mesh) -> int:
    checked = _check_cases(mesh)
    _check_scattered_placement(mesh)
    if mesh.shape.tp > 1:
        _check_tensor_parallel(mesh)
    return checked


def _check_cases(mesh: Mesh) -> int:
    checked = 0
    for case in CASES:
        placement = spread(case.num_experts, mesh.shape.world_size)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            _check_layer(mesh, case, placement, dtype, tolerance)
            checked += 1
    return checked


def _check_layer(mesh: Mesh, case: Any, placement: Placement, dtype: torch.dtype, tolerance: float) -> None:
    num_tokens = tuple(case.tokens_per_rank(mesh.shape.world_size))
    transport, layout = AllToAllTransport(mesh.world, placement.capacity), lay_out(placement, mesh.rank, "cpu")
    x_TD, ids_TK, w_TK = make_tokens(case, mesh.rank, num_tokens[mesh.rank], dtype)
    weights_EDD = expert_weights(case.num_experts, dtype)
    y_TD = expert_layer(transport, layout, num_tokens, x_TD, ids_TK, w_TK, weights_EDD)
    alone = lay_out(spread(case.num_experts, 1), 0, "cpu")
    local_TD = expert_layer(LocalTransport(case.num_experts), alone, (len(x_TD),), x_TD, ids_TK, w_TK, weights_EDD)
    assert y_TD.dtype == dtype
    assert torch.equal(y_TD, local_TD), f"{case}, {dtype}: differs from one rank's"
    expected_TD = reference(x_TD, ids_TK, w_TK, weights_EDD)
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=tolerance, atol=tolerance, msg=lambda m: f"{case}: {m}")
    # Each pair is computed exactly once in the group, by the rank that holds the expert.
    dispatched, handle = transport.dispatch(x_TD, assign(ids_TK, layout), num_tokens)()
    assert int(dispatched.counts_L.sum()) <= dispatched.x_RD.shape[0]
    rows = mesh.control.all_gather(dispatched.counts_L).sum().item()
    assert rows == sum(num_tokens) * case.k, f"{case}: {rows} rows for {sum(num_tokens)} tokens"
    transport.combine(dispatched.x_RD, w_TK, handle)()


def _check_scattered_placement(mesh: Mesh) -> None:
    """Experts in no order over ranks, as a rebalancer would leave them, with all on the last rank at the extreme."""
    case, size = CASES[5], mesh.shape.world_size
    order = torch.randperm(case.num_experts, generator=torch.Generator().manual_seed(3)).tolist()
    dealt = [order[r::size] for r in range(size)]
    capacity = len(dealt[0])
    scattered = tuple(tuple(experts + [EMPTY] * (capacity - len(experts))) for experts in dealt)
    last = ((EMPTY,) * len(order),) * (size - 1) + (tuple(order),)
    for slots in (scattered, last):
        _check_layer(mesh, case, Placement(case.num_experts, slots), torch.float32, 1e-5)


def _check_tensor_parallel(mesh: Mesh) -> None:
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


def _timings(mesh: Mesh) -> dict[str, float]:
    """Median microseconds, printed by the test; no bound is asserted, machines differ."""
    torch.manual_seed(mesh.rank)
    x_TD = torch.randn(16, 512).to(torch.bfloat16)
    ids_TK = torch.rand(16, 16).topk(4, dim=1).indices
    w_TK = torch.rand(16, 4)
    placement = spread(16, mesh.shape.world_size)
    transport = AllToAllTransport(mesh.world, placement.capacity)
    slots_TK = assign(ids_TK, lay_out(placement, mesh.rank, "cpu"))
    num_tokens_N = (16,) * mesh.shape.world_size

    def layer() -> None:
        dispatched, handle = transport.dispatch(x_TD, slots_TK, num_tokens_N)()
        transport.combine(dispatched.x_RD, w_TK, handle)()

    small = torch.zeros(3, dtype=torch.int64)
    return {
        "all_gather of 24 bytes": _median(lambda: mesh.control.all_gather(small)),
        "broadcast of 4 KiB": _median(lambda: mesh.control.broadcast_(torch.zeros(4096, dtype=torch.uint8), 0)),
        "dispatch + combine": _median(layer),
    }


def _median(call: Callable[[], object], rounds: int = 60) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[rounds // 2] * 1e6, 1)
