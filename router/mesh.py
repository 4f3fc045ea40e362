"""Joining a group: the process groups a rank needs, made for one epoch and closed with it.

Process groups are built directly on a store under the epoch's prefix, never through torch's default group: nothing is
global, a process may be in two groups at once (the old epoch being aborted, the new one forming), and a message of an
old epoch has no socket to arrive on.

The store is a TCPStore whose server lives outside the ranks, so that no rank is special and any may die.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # where torch's own types for them are

from moestro.router.parallel import GroupShape, NoTensorParallel, TensorParallel
from moestro.router.transport import Arrival

DeviceKind = Literal["cpu", "cuda"]


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


class Collectives:
    """One process group. Every rank of it calls the same methods in the same order, from one thread at a time.

    Raises RuntimeError when a peer is gone, the group's timeout passes, or it was closed; it is then broken for good.
    """

    def __init__(self, rank: int, size: int, backend: Any) -> None:
        # backend: ProcessGroupGloo or ProcessGroupNCCL, Any since their stubs differ between torch versions
        self.rank, self.size, self._backend = rank, size, backend

    @property
    def backend(self) -> Any:
        if self._backend is None:
            raise RuntimeError("this process group is closed")
        return self._backend

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival[Tensor]:
        """Rows ``x[sum(send[:p]) : ][: send[p]]`` go to rank p; what rank p sent arrives at the same place by
        ``receive``. ``x`` is [sum(send), D] with D ≥ 1, the result [sum(receive), D]. Rows travel as bytes, since not
        every backend knows every dtype. Under way when this returns: over gloo on threads of its own, over NCCL on a
        stream of its own, where the arrival makes the current stream wait and not the host."""
        bytes_in = x.contiguous().view(torch.uint8)
        bytes_out = torch.empty(sum(receive), bytes_in.shape[1], dtype=torch.uint8, device=x.device)
        work = self.backend.alltoall_base(bytes_out, bytes_in, list(receive), list(send))

        def arrived() -> Tensor:
            work.wait()
            return bytes_out.view(x.dtype)

        return arrived

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """``start_all_to_all``, awaited."""
        return self.start_all_to_all(x, send, receive)()

    def start_gather_rows(self, x_TD: Tensor, num_rows_N: Sequence[int]) -> Arrival[Tensor]:
        """Every rank's rows on every rank, in order of rank; rank p has ``num_rows_N[p]`` of them."""
        # An all-to-all of copies takes one round where gloo's all-gather goes round a ring in size - 1.
        return self.start_all_to_all(x_TD.repeat(self.size, 1), (x_TD.shape[0],) * self.size, num_rows_N)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: every rank's ``x``, all of one shape."""
        if x.numel() == 0:
            return x.new_empty((self.size, *x.shape))
        return self.start_gather_rows(x.reshape(1, -1), (1,) * self.size)().view(self.size, *x.shape)

    def broadcast_(self, x: Tensor, root: int) -> Tensor:
        """Overwrites ``x`` with the root's."""
        self.backend.broadcast(x, root).wait()
        return x

    def close(self) -> None:
        """Peers that wait for this rank, or will, see a lost connection. A second call does nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.shutdown()  # does nothing in gloo, whose connections close when its last reference is gone


@dataclass(frozen=True, slots=True)
class MeshTensorParallel:
    """TensorParallel over a process group."""

    collectives: Collectives

    @property
    def rank(self) -> int:
        return self.collectives.rank

    @property
    def size(self) -> int:
        return self.collectives.size

    def sum(self, x: Tensor) -> Tensor:
        """Gathers, adds in rank order in fp32, casts back: the order does not depend on how the backend reduces."""
        parts = self.collectives.all_gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self.collectives.all_gather(x).unbind(0), dim=dim)


@dataclass(frozen=True, slots=True)
class Mesh:
    """A rank's place in a group of one epoch. ``world`` and ``tp`` carry tensors on ``device``; ``control`` and
    ``tp_control`` carry small host tensors over gloo, whatever the device."""

    shape: GroupShape
    rank: int
    epoch: int
    device: torch.device
    world: Collectives
    control: Collectives
    tp: TensorParallel
    tp_control: Collectives | None  # None in a tensor-parallel set of one

    def _collectives(self) -> list[Collectives]:
        tp = [self.tp.collectives] if isinstance(self.tp, MeshTensorParallel) else []
        return [self.world, self.control, *tp, *([self.tp_control] if self.tp_control else [])]

    def close(self) -> None:
        """Leaves the group: from the thread that uses it, between collectives."""
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
    hostname: str = "127.0.0.1",
    interface: str = "",
) -> Mesh:
    """Forms the group of ``epoch`` with the other ranks. Blocks until all have come, at most ``timeout_s``.

    ``timeout_s`` also bounds every later collective. Gloo listens on ``interface`` if given, else where ``hostname``
    (this machine as its peers call it) resolves to. Raises ValueError for a rank outside the shape and RuntimeError
    when the group does not form in time.
    """
    if not 0 <= rank < shape.world_size:
        raise ValueError(f"rank must be in [0, {shape.world_size}), got {rank}")
    device = torch.device(device_kind, device_index) if device_kind == "cuda" else torch.device("cpu")
    dp_rank, tp_rank = shape.dp_rank(rank), shape.tp_rank(rank)

    def group(name: str, kind: DeviceKind, its_rank: int, size: int) -> Collectives:
        prefixed = PrefixStore(f"epoch/{epoch}/{name}", store)
        timeout = timedelta(seconds=timeout_s)
        if kind == "cuda":
            return Collectives(its_rank, size, _nccl(prefixed, its_rank, size, timeout, device))
        return Collectives(its_rank, size, _gloo(prefixed, its_rank, size, timeout, hostname, interface))

    tp: TensorParallel = NoTensorParallel()
    tp_control = None
    world = group("world", device_kind, rank, shape.world_size)
    control = group("control", "cpu", rank, shape.world_size)
    if shape.tp > 1:
        tp = MeshTensorParallel(group(f"tp/{dp_rank}", device_kind, tp_rank, shape.tp))
        tp_control = group(f"tp_control/{dp_rank}", "cpu", tp_rank, shape.tp)
    return Mesh(shape, rank, epoch, device, world, control, tp, tp_control)


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
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)
