"""Joining a group: the process groups a rank needs, made for one epoch and closed with it.

Process groups are built directly on a store under the epoch's prefix, never through torch's default group: nothing is
global, a process may be in two groups at once (the old epoch being aborted, the new one forming), and a message of an
old epoch has no socket to arrive on.

The store is a TCPStore whose server lives outside the ranks, so that no rank is special and any may die.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where torch's own types for them are

from moestro.router.board import Board, BoardCollectives, NoBoard, form_board
from moestro.router.collectives import Collectives, NcclCollectives, NoPeers
from moestro.router.parallel import GroupShape, NoTensorParallel, TensorParallel

DeviceKind = Literal["cpu", "cuda"]

log = logging.getLogger(__name__)

_CLEAN_UP_ONLY = "2"  # of torch's ErrorHandlingMode: abort the communicators and go on


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a group's store listens."""

    host: str
    port: int

    def connect(self, timeout_s: float, prefix: str = "") -> Store:
        """A new client, whose keys lie under ``prefix``. It serves one thread at a time: a blocking wait holds its
        lock."""
        timeout = timedelta(seconds=timeout_s)
        client = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(prefix, client) if prefix else client


def serve_store(host: str = "127.0.0.1", timeout_s: float = 60.0) -> tuple[TCPStore, StoreAddress]:
    """Starts a store server on a free port of ``host`` only; it lives as long as the returned store is referenced."""
    # Left to itself TCPStore listens on every interface; a socket bound here listens where it is told.
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=512)
    address = StoreAddress(host, listener.getsockname()[1])
    store = TCPStore(
        host,
        address.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, address


@dataclass(frozen=True, slots=True)
class MeshTensorParallel:
    """TensorParallel over a process group."""

    collectives: Collectives
    wait_s: float = 0.0  # a seat counts

    @property
    def rank(self) -> int:
        return self.collectives.rank

    @property
    def size(self) -> int:
        return self.collectives.size

    def sum(self, x: Tensor) -> Tensor:
        return self.collectives.sum(x)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self.collectives.all_gather(x).unbind(0), dim=dim)


@dataclass(frozen=True, slots=True)
class Mesh:
    """A rank's place in a group of one epoch. ``world`` and ``tp`` carry tensors on ``device``; ``control`` and
    ``tp_control`` carry small host tensors, whatever the device. ``board`` is what all ranks share where they are on
    one host and compute on its processors."""

    shape: GroupShape
    rank: int
    epoch: int
    device: torch.device
    world: Collectives
    control: Collectives
    tp: TensorParallel
    tp_control: Collectives | None  # None in a tensor-parallel set of one
    board: Board | NoBoard

    @property
    def progress(self) -> int:
        """How many collectives of the whole group this rank has come to. Any thread."""
        return self.world.progress + self.control.progress

    def check(self) -> None:
        """Raises GroupBroken when what the last collectives returned cannot be believed: over NCCL those that were
        aborted return all the same."""
        for collectives in self._collectives():
            collectives.check()

    def _collectives(self) -> list[Collectives]:
        tp = [self.tp.collectives] if isinstance(self.tp, MeshTensorParallel) else []
        return [self.world, self.control, *tp, *([self.tp_control] if self.tp_control else [])]

    def close(self) -> None:
        """Leaves the group, from any thread: what it waits for ends with GroupBroken (see ``Collectives.close``)."""
        for collectives in self._collectives():
            collectives.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def join(
    shape: GroupShape,
    rank: int,
    store: Store,
    *,
    device_kind: DeviceKind = "cpu",
    device_index: int = 0,
    epoch: int = 0,
    timeout_s: float = 60.0,
    forming_s: float = 60.0,
    hostname: str = "127.0.0.1",
    interface: str = "",
) -> Mesh:
    """Forms the group of ``epoch`` with the other ranks. Blocks until all have come, at most ``forming_s``.

    ``timeout_s`` bounds every later collective. Gloo listens on ``interface`` if given, else where ``hostname`` (this
    machine as its peers call it) resolves to. Raises ValueError for a rank outside the shape and RuntimeError when the
    group does not form in time.
    """
    if not 0 <= rank < shape.world_size:
        raise ValueError(f"rank must be in [0, {shape.world_size}), got {rank}")
    device = torch.device(device_kind, device_index) if device_kind == "cuda" else torch.device("cpu")
    dp_rank, tp_rank = shape.dp_rank(rank), shape.tp_rank(rank)

    def group(name: str, kind: DeviceKind, its_rank: int, size: int) -> tuple[Collectives, Board | NoBoard]:
        prefixed = PrefixStore(f"epoch/{epoch}/{name}", store)
        if kind == "cuda":
            nccl = _nccl(prefixed, its_rank, size, timedelta(seconds=timeout_s), device)
            return NcclCollectives(its_rank, size, nccl), NoBoard("the ranks compute on CUDA devices")
        backend = _gloo(prefixed, its_rank, size, timedelta(seconds=forming_s), hostname, interface)
        backend._set_default_timeout(timedelta(seconds=timeout_s))
        gloo = Collectives(its_rank, size, backend)
        board = form_board(
            prefixed, its_rank, size, ranks_here=shape.world_size, timeout_s=timeout_s, forming_s=forming_s
        )
        return (gloo if isinstance(board, NoBoard) else BoardCollectives(board, gloo)), board

    tp: TensorParallel = NoTensorParallel()
    tp_control = None
    world, board = group("world", device_kind, rank, shape.world_size)
    control, _ = group("control", "cpu", rank, shape.world_size)
    if shape.tp > 1:
        tp = MeshTensorParallel(group(f"tp/{dp_rank}", device_kind, tp_rank, shape.tp)[0])
        tp_control, _ = group(f"tp_control/{dp_rank}", "cpu", tp_rank, shape.tp)
    if isinstance(board, NoBoard):
        log.info("the ranks of this group share no memory: %s", board.reason)
    return Mesh(shape, rank, epoch, device, world, control, tp, tp_control, board)


def alone(device: torch.device) -> Mesh:
    """A group of one, which needs no store and opens no connection."""
    nobody = NoPeers()
    return Mesh(
        GroupShape(), 0, 0, device, nobody, nobody, NoTensorParallel(), None, NoBoard("there is one rank alone")
    )


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, hostname: str, interface: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    where = {"interface": interface} if interface else {"hostname": hostname}
    options._devices = [gloo.create_device(**where)]
    return gloo(store, rank, size, options)


def _nccl(store: Store, rank: int, size: int, timeout: timedelta, device: torch.device) -> Any:
    if not dist.is_nccl_available():
        raise RuntimeError("this torch has no NCCL, which ranks on CUDA devices need")
    torch.cuda.set_device(device)  # NCCL takes the current device for its own streams and barriers
    # What NCCL says of a peer breaks the group, and not the process as torch would have it.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", _CLEAN_UP_ONLY)
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)
