"""What the ranks of a group do together: one process group, or memory that they share.

Legend: T tokens, D width, N ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ErrorType

from moestro.router.transport import Arrival


class GroupBroken(RuntimeError):
    """A group can do nothing more together: a peer is gone, late or left, or this rank was called away. Nobody's own
    fault; a new group must be formed."""


class Collectives:
    """One process group. Every rank of it calls the same methods in the same order, from one thread at a time;
    ``close`` and ``progress`` may be called from any.

    Raises GroupBroken when a peer is gone, the group's timeout passes, or it was closed; it is then broken for good.
    """

    def __init__(self, rank: int, size: int, backend: Any) -> None:
        # backend: ProcessGroupGloo or ProcessGroupNCCL, Any since their stubs differ between torch versions
        self.rank, self.size, self._backend = rank, size, backend
        self._num_begun = 0

    @property
    def backend(self) -> Any:
        if self._backend is None:
            raise GroupBroken("this process group is closed")
        return self._backend

    @property
    def progress(self) -> int:
        """How many operations this rank has come to."""
        return self._num_begun

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival[Tensor]:
        """Rows ``x[sum(send[:p]) : ][: send[p]]`` go to rank p; what rank p sent arrives at the same place by
        ``receive``. ``x`` is [sum(send), D] with D ≥ 1, the result [sum(receive), D]. Rows travel as bytes, since not
        every backend knows every dtype. Under way when this returns: over gloo on threads of its own, over NCCL on a
        stream of its own, where the arrival makes the current stream wait and not the host."""
        bytes_in = x.contiguous().view(torch.uint8)
        bytes_out = torch.empty(sum(receive), bytes_in.shape[1], dtype=torch.uint8, device=x.device)
        self._num_begun += 1
        backend = self.backend
        try:
            work = backend.alltoall_base(bytes_out, bytes_in, list(receive), list(send))
        except RuntimeError as error:
            raise _broken(error) from error

        def arrived() -> Tensor:
            _await(work)
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
        self._num_begun += 1
        backend = self.backend
        try:
            work = backend.broadcast(x, root)
        except RuntimeError as error:
            raise _broken(error) from error
        _await(work)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Gathers, adds in rank order in fp32, casts back: the order does not depend on how the backend reduces."""
        parts = self.all_gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def check(self) -> None:
        """Raises GroupBroken when this group was closed."""
        _ = self.backend

    def close(self) -> None:
        """Peers that wait for this rank, or will, see a lost connection. A call that waits ends: over NCCL at
        once, over gloo when its peers leave or its time is up. A second call does nothing."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort()  # does nothing in gloo, whose connections close when its last reference is gone


class NcclCollectives(Collectives):
    """Over NCCL, which tells of a failure when it is asked."""

    def check(self) -> None:
        super().check()
        error = self.backend.get_error()
        if error != ErrorType.SUCCESS:
            raise GroupBroken(f"NCCL: {error}")


class NoPeers(Collectives):
    """A group of one: what is sent arrives."""

    def __init__(self) -> None:
        super().__init__(0, 1, None)

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival[Tensor]:
        return lambda: x

    def broadcast_(self, x: Tensor, root: int) -> Tensor:
        return x

    def check(self) -> None:
        pass


def _await(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise _broken(error) from error


def _broken(error: RuntimeError) -> GroupBroken:
    """With what gloo says in its first sentence, less the place in its source."""
    first = re.split(r"\.(?:\s|$)", re.sub(r"^\[[^\]]*\] *", "", str(error)))[0]
    return GroupBroken(first)
