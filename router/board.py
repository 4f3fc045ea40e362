"""Boards: memory that the ranks of one host share, instead of sockets between them.

Legend: T tokens of this rank, D model width, K experts per token, N ranks, L slots of a rank, R rows for this rank.

The segment is anonymous (memfd_create): rank 0 makes it and tells the group's store its process and descriptor, the
others open it through /proc, and after that it has no name. So nothing is left behind whenever a rank is killed. How
ranks write, wait and notice a dead peer is in ``native/board.h``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from moestro.kernels.native_module import BuildError
from moestro.router.collectives import Collectives
from moestro.router.native import build

log = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20
"""What a rank can put on a board in one operation. Address space: what is never written takes no memory."""

_SPIN_S = 100e-6
"""How long to look before sleeping, where each rank has its cores to itself."""

_DTYPES = (torch.bfloat16, torch.float32)
"""What the native module adds up."""


class Board(Protocol):
    """The native module's. Every rank calls the same methods in the same order, from one thread at a time; up to four
    operations may be under way. GroupBroken as for Collectives, ValueError (before anything is sent) for what does not
    fit. ``close`` may be called from any thread, also while another waits in one of the others."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def part_bytes(self) -> int: ...

    @property
    def operations(self) -> int:
        """How many were begun here. Any thread."""

    def post_tokens(self, x_TD: Tensor, slots_TK: Tensor, max_tokens: int) -> int:
        """Begins an operation and returns its number. ``max_tokens`` is the busiest rank's, which must fit."""

    def take_rows(
        self, operation: int, num_tokens_N: Sequence[int], k: int, capacity: int, like_TD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for all ranks' tokens: x_RD sorted by slot of this rank, counts_L, and home_R for ``post_rows``."""

    def post_rows(self, y_RD: Tensor, home_R: Tensor) -> int:
        """Begins an operation: each row to the pair whose it is."""

    def sum_rows(self, operation: int, weights_TK: Tensor, like_RD: Tensor) -> Tensor:
        """Waits for all ranks' rows: y_TD, this rank's ``weighted_sum``."""

    def all_gather(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...

    def broadcast_(self, x: Tensor, root: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NoBoard:
    """Why the ranks of a group share none, the same words on all of them."""

    reason: str


class BoardCollectives(Collectives):
    """Collectives whose small tensors pass over a board and all others through the process group. Which way is decided
    by what all ranks know: a tensor's shape and dtype."""

    def __init__(self, board: Board, group: Collectives) -> None:
        super().__init__(group.rank, group.size, group.backend)
        self._board = board

    @property
    def progress(self) -> int:
        return super().progress + self._board.operations

    def _fits(self, x: Tensor) -> bool:
        return x.nbytes <= self._board.part_bytes

    def all_gather(self, x: Tensor) -> Tensor:
        return self._board.all_gather(x) if self._fits(x) else super().all_gather(x)

    def broadcast_(self, x: Tensor, root: int) -> Tensor:
        if not self._fits(x):
            return super().broadcast_(x, root)
        self._board.broadcast_(x, root)
        return x

    def sum(self, x: Tensor) -> Tensor:
        return self._board.sum(x) if self._fits(x) and x.dtype in _DTYPES else super().sum(x)

    def close(self) -> None:
        self._board.close()
        super().close()


def prepare() -> None:
    """Builds and loads what boards need, where that can be done: it may take a minute, which a group that forms would
    have to wait for."""
    try:
        build.load()
    except BuildError as error:
        log.info("the ranks of this host will share no memory: %s", error)


def form_board(
    store: Store,
    rank: int,
    size: int,
    *,
    ranks_here: int,
    timeout_s: float,
    forming_s: float = 60.0,
    part_bytes: int = PART_BYTES,
) -> Board | NoBoard:
    """A board for the ``size`` ranks that share ``store``, all of which call this. Blocks until they have, at most
    ``forming_s``; ``timeout_s`` bounds every later wait. Where one of them cannot take part none gets a board.

    ``ranks_here`` is how many ranks compute on this host: with cores enough for all of them a waiting one looks for a
    while before it sleeps. Raises torch's DistError when a rank does not come.
    """
    mine = _offer(rank, size, part_bytes)
    try:
        texts = _exchange(store, "offer", rank, size, json.dumps(asdict(mine)), forming_s)
        offers = [_Offer(**json.loads(text)) for text in texts]
        reason = _refusal(offers)
        if reason:
            return NoBoard(reason)
        spin_s = _SPIN_S if ranks_here * torch.get_num_threads() <= len(os.sched_getaffinity(0)) else 0.0
        board = _open(offers, rank, part_bytes, spin_s, timeout_s)
        problem = board.reason if isinstance(board, NoBoard) else ""
        problems = _exchange(store, "opened", rank, size, problem, forming_s)
        problem = next((f"rank {r}: {problem}" for r, problem in enumerate(problems) if problem), "")
        return NoBoard(problem) if problem else board
    finally:
        if mine.descriptor >= 0:
            os.close(mine.descriptor)


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a rank tells the others before anything is shared."""

    host: str  # the boot, and the namespace in which process ids mean something
    process: int
    descriptor: int  # of the segment, on rank 0; -1 elsewhere
    token: str  # what the segment begins with
    problem: str  # why this rank has no boards


def _offer(rank: int, size: int, part_bytes: int) -> _Offer:
    descriptor, token, host, problem = -1, "", "", ""
    try:
        module = build.load()
        host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        if rank == 0:
            descriptor, token = os.memfd_create("moestro-board"), secrets.token_hex(module.TOKEN_BYTES // 2)
            os.ftruncate(descriptor, module.segment_bytes(size, part_bytes))
            module.prepare(descriptor, size, token)
    except (OSError, RuntimeError) as error:
        problem = str(error)
    return _Offer(host, os.getpid(), descriptor, token, problem)


def _refusal(offers: list[_Offer]) -> str:
    for rank, offer in enumerate(offers):
        if offer.problem:
            return f"rank {rank}: {offer.problem}"
    others = [rank for rank, offer in enumerate(offers) if offer.host != offers[0].host]
    return f"rank {others[0]} is on another host or in another container than rank 0" if others else ""


def _open(offers: list[_Offer], rank: int, part_bytes: int, spin_s: float, timeout_s: float) -> Board | NoBoard:
    """Maps the segment that rank 0 offers."""
    module, owner = build.load(), offers[0]
    try:
        with ExitStack() as opened:

            def held(descriptor: int) -> int:
                opened.callback(os.close, descriptor)
                return descriptor

            segment = held(os.open(f"/proc/{owner.process}/fd/{owner.descriptor}", os.O_RDWR))
            # A process of that number may be another one by now.
            if os.pread(segment, module.TOKEN_BYTES, 0) != owner.token.encode():
                return NoBoard("the segment of rank 0 is not where it said")
            peers = [-1 if peer == rank else held(os.pidfd_open(offer.process)) for peer, offer in enumerate(offers)]
            nanoseconds = (int(spin_s * 1e9), int(timeout_s * 1e9))
            board: Board = module.Board(segment, rank, len(offers), part_bytes, *nanoseconds, peers)
            return board
    except (OSError, RuntimeError) as error:
        return NoBoard(str(error))


def _exchange(store: Store, name: str, rank: int, size: int, mine: str, timeout_s: float) -> list[str]:
    """Every rank's text, by rank."""
    store.set(f"{name}/{rank}", mine)
    keys = [f"{name}/{peer}" for peer in range(size)]
    store.wait(keys, timedelta(seconds=timeout_s))
    return [text.decode() for text in store.multi_get(keys)]
