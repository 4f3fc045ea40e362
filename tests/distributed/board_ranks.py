"""What each rank does in test_board: runs in processes of its own."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from moestro.kernels.native_module import BuildError
from moestro.router.board import BoardCollectives, NoBoard, form_board
from moestro.router.mesh import Mesh, StoreAddress, join
from moestro.router.native import build
from moestro.router.parallel import GroupShape
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.router.transports.shared_memory import SharedMemoryTransport


def start(rank: int, world_size: int, address: StoreAddress, timeout_s: float = 30.0, epoch: int = 0) -> Mesh:
    mesh = join(GroupShape(world_size), rank, address.connect(30), timeout_s=timeout_s, epoch=epoch)
    assert not isinstance(mesh.board, NoBoard), mesh.board.reason
    assert isinstance(mesh.world, BoardCollectives)
    return mesh


def exchange(rank: int, world_size: int, address: StoreAddress, seed: int, rounds: int) -> int:
    """Small exchanges of every kind in random order with random pauses; every value is checked. Returns how many."""
    same, own = random.Random(seed), random.Random(f"{seed} {rank}")
    with start(rank, world_size, address) as mesh:
        transport = SharedMemoryTransport(mesh.board, 2)  # type: ignore[arg-type]
        for number in range(rounds):
            if own.random() < 0.02:
                time.sleep(own.choice((0, 0.0001, 0.001)))
            kind, where = same.choice(("gather", "broadcast", "sum", "rows", "two")), f"seed {seed}, round {number}"
            base = torch.arange(same.randint(1, 9)) + number
            if kind == "gather":
                expected = torch.stack([base * (r + 1) for r in range(world_size)])
                assert torch.equal(mesh.control.all_gather(base * (rank + 1)), expected), where
            elif kind == "broadcast":
                root = same.randrange(world_size)
                assert torch.equal(mesh.control.broadcast_(base * (rank == root), root), base), where
            elif kind == "sum":
                total = (base * sum(range(1, world_size + 1))).float()
                assert torch.equal(mesh.control.sum((base * (rank + 1)).float()), total), where
            else:
                _rows(transport, same, rank, world_size, 2 if kind == "two" else 1, where)
    return rounds


def _rows(
    transport: SharedMemoryTransport, same: random.Random, rank: int, world_size: int, parts: int, where: str
) -> None:
    """Tokens that say whose they are, to slots that say what they add."""
    cases = []
    for _ in range(parts):
        tokens = tuple(same.choice((0, 1, 3)) for _ in range(world_size))
        slots = [[same.sample(range(2 * world_size), 2) for _ in range(n)] for n in tokens]
        slots_TK = torch.tensor(slots[rank], dtype=torch.int64).reshape(-1, 2)
        x_TD = torch.arange(len(slots_TK) * 4).reshape(-1, 4).float() + 100 * rank
        cases.append((tokens, slots_TK, x_TD))
    arriving = [transport.dispatch(x_TD, slots_TK, tokens) for tokens, slots_TK, x_TD in cases]
    returning = []
    for arrival, (_, slots_TK, _) in zip(arriving, cases, strict=True):
        dispatched, home_R = arrival()
        slot_R = torch.arange(2).repeat_interleave(dispatched.counts_L) + 2 * rank
        y_RD = dispatched.x_RD + 1000 * slot_R.unsqueeze(1)
        returning.append(transport.combine(y_RD, torch.ones(slots_TK.shape), home_R))
    for arrival_home, (_, slots_TK, x_TD) in zip(returning, cases, strict=True):
        assert torch.equal(arrival_home(), 2 * x_TD + 1000 * slots_TK.sum(1, keepdim=True)), where


def killed_peer(rank: int, world_size: int, address: StoreAddress) -> list[object]:
    """The last rank is killed while the others wait for it: what they are told, and after how long."""
    mesh = start(rank, world_size, address)
    mesh.control.all_gather(torch.zeros(1))
    store = address.connect(30)
    if rank == world_size - 1:
        store.set("process", str(os.getpid()))
        time.sleep(60)
    if rank == 0:
        process = int(store.get("process"))
        time.sleep(0.2)  # the others are waiting by then
        store.set("killed at", repr(time.monotonic()))
        os.kill(process, signal.SIGKILL)
    with pytest.raises(RuntimeError) as error:
        mesh.world.all_gather(torch.zeros(1))
    after_s = time.monotonic() - float(store.get("killed at"))
    with pytest.raises(RuntimeError, match="rank"):
        mesh.world.all_gather(torch.zeros(1))
    return [str(error.value), after_s]


def slow_peer(rank: int, world_size: int, address: StoreAddress) -> float:
    """A rank that is stopped for 0.3 s in the middle of exchanges. Returns the longest wait of this one."""
    with start(rank, world_size, address) as mesh:
        store = address.connect(30)
        if rank == 1:
            store.set("process", str(os.getpid()))
        process, longest = int(store.get("process")), 0.0
        for number in range(400):
            if rank == 0 and number == 200:
                os.kill(process, signal.SIGSTOP)
                if os.fork() == 0:
                    time.sleep(0.3)
                    os.kill(process, signal.SIGCONT)
                    os._exit(0)
            began = time.monotonic()
            seen = mesh.world.all_gather(torch.tensor([number, rank]))
            longest = max(longest, time.monotonic() - began)
            assert seen.tolist() == [[number, r] for r in range(world_size)]
        return longest


def late_peer(rank: int, world_size: int, address: StoreAddress) -> str:
    """A rank that does not come: what the others are told."""
    mesh = start(rank, world_size, address, timeout_s=0.5 if rank == 0 else 10)
    if rank == 1:
        time.sleep(1.5)
        mesh.control.all_gather(torch.zeros(1))  # what rank 0 had sent before it gave up is there
    with pytest.raises(RuntimeError) as error:
        mesh.control.all_gather(torch.zeros(1))
    return str(error.value)


def many_epochs(rank: int, world_size: int, address: StoreAddress, epochs: int) -> list[int]:
    """Descriptors and mapped segments of this process before and after."""

    def held() -> list[int]:
        maps = Path("/proc/self/maps").read_text().count("moestro-board")
        boards_open = [link for link in Path("/proc/self/fd").iterdir() if "board" in _target(link)]
        pidfds = [link for link in Path("/proc/self/fd").iterdir() if "pidfd" in _target(link)]
        return [maps, len(boards_open), len(pidfds)]

    before = held()
    for epoch in range(epochs):
        with start(rank, world_size, address, epoch=epoch) as mesh:
            mesh.world.all_gather(torch.zeros(3))
        del mesh
    return [now - then for now, then in zip(held(), before, strict=True)]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # the descriptor that lists the folder
        return ""


def too_large(rank: int, world_size: int, address: StoreAddress) -> list[bool]:
    """What does not fit a board goes by gloo; rows that do not fit are refused before anything is sent."""
    gloo = start(rank, world_size, address)
    board = form_board(address.connect(30, "small"), rank, world_size, ranks_here=1, timeout_s=30, part_bytes=4096)
    assert not isinstance(board, NoBoard), board.reason
    small = BoardCollectives(board, gloo.world)
    seen = []
    for rows in (2, 3000):
        parts = [torch.arange(rows) + r for r in range(world_size)]
        seen.append(torch.equal(small.all_gather(parts[rank]), torch.stack(parts)))
        seen.append(torch.equal(small.broadcast_(parts[rank].clone(), 1), parts[1]))
        seen.append(torch.equal(small.sum(parts[rank].float()), sum(part.float() for part in parts)))
    seen.append(torch.equal(small.sum(parts[rank][:4].half()), sum(part[:4].half() for part in parts)))
    with pytest.raises(ValueError, match="a part of the board holds 4096 bytes, not 8320"):
        SharedMemoryTransport(board, 1).dispatch(torch.zeros(8, 128), torch.full((8, 2), rank), (8,) * world_size)
    x_TD, slots_TK = torch.ones(1, 4), torch.full((1, 1), rank)
    dispatched, home_R = SharedMemoryTransport(board, 1).dispatch(x_TD, slots_TK, (1,) * world_size)()
    seen.append(dispatched.counts_L.tolist() == [1] and home_R.shape == (1,))
    return seen


def no_compiler(rank: int, world_size: int, address: StoreAddress) -> str:
    """Rank 1 cannot build: none of them gets a board, all say why, and gloo serves."""
    if rank == 1:

        def refuse() -> object:
            raise BuildError("no C++ compiler: c++ is not found")

        build.load = refuse  # type: ignore[assignment]
    with join(GroupShape(world_size), rank, address.connect(30), timeout_s=30) as mesh:
        assert mesh.world.all_gather(torch.tensor([rank])).tolist() == [[r] for r in range(world_size)]
        x_TD, slots_TK = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64)
        GatherScatterTransport(mesh.world, 1).dispatch(x_TD, slots_TK, (2,) * world_size)()
        return mesh.board.reason if isinstance(mesh.board, NoBoard) else ""
