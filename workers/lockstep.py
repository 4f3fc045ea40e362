"""The ranks of a group take their steps together.

Every layer with experts is a collective, so a rank without work must still walk through a step that any other rank
takes, and when no rank has work none may spin. One round of the engine loop:

    inbox, now = lockstep.begin(inbox, now)       ranks of a tensor-parallel set see the same messages and clock
    agreement = lockstep.agree(num_tokens)        all ranks see how many tokens each has planned
    if agreement.stop: leave the loop
    if agreement.idle: lockstep.sleep()           all ranks go, since all saw the same numbers
    else:              forward, with zero tokens too

Sleeping is a blocking wait for a key in the group's store: the n-th sleep of an epoch waits for key n, and whoever
gets work sets that key, which wakes all. n agrees everywhere because the agreements do. A key set between the decision
to sleep and the wait is already there when the wait begins, so no wake-up is lost; one too many costs an empty round.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import DistError

from moestro.router.collectives import Collectives, GroupBroken
from moestro.router.mesh import Mesh, StoreAddress

log = logging.getLogger(__name__)

INLINE_BYTES = 4096
"""Size of the first broadcast to tensor-parallel peers; an inbox that does not fit takes a second one."""

_HEAD = struct.Struct("<dQ")  # clock, bytes of all messages
_LENGTH = struct.Struct("<I")
_FOREVER = timedelta(days=365)
_CLOSED = "this rank was called away"


class LockstepBroken(GroupBroken):
    """The ranks no longer agree on where they are."""


class Note(NamedTuple):
    """What a rank tells all others at the head of a step beside its tokens."""

    done: int = 0  # its background tasks are done up to this number
    failed: int = 0  # the number of one that failed, 0 for none
    command_bytes: int = 0  # of a command that it will broadcast once this is agreed on
    clock_ns: int = 0
    wait_ns: int = 0  # how long it waited for the others in its last step


NOTHING = Note()


@dataclass(frozen=True, slots=True)
class StepAgreement:
    """What all ranks know at the head of a step, the same on each."""

    step: int
    tokens_per_rank: tuple[int, ...]
    stopping: tuple[bool, ...]  # by rank: has it been asked to stop?
    notes: tuple[Note, ...]

    @property
    def stop(self) -> bool:
        return any(self.stopping)

    @property
    def idle(self) -> bool:
        return not any(self.tokens_per_rank)


class Lockstep(Protocol):
    """``begin``, ``agree`` and ``sleep`` belong to the engine's thread; ``wake``, ``stop`` and ``close`` to any."""

    def begin(self, inbox: list[bytes], now: float) -> tuple[list[bytes], float]:
        """The leader's messages and clock reading (seconds), on every rank of its tensor-parallel set. What the other
        ranks pass is dropped. Collective within the set."""

    def agree(self, num_tokens: int, note: Note = NOTHING) -> StepAgreement:
        """Tells all ranks how many tokens this one has planned, and a note. Collective; raises LockstepBroken when the
        ranks are in different steps or the ranks of a tensor-parallel set planned different numbers."""

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]: every rank's ``x``, small, on the host, all of one shape. Collective."""

    def broadcast(self, data: bytes, root: int, num_bytes: int) -> bytes:
        """The root's ``num_bytes`` bytes, on every rank; what the others pass is dropped. Collective."""

    def sleep(self) -> None:
        """Blocks, using no processor time, until some rank calls ``wake`` or ``stop``. Collective: only after an
        agreement that was idle. Raises GroupBroken when this rank was closed or the group's store is gone."""

    def wake(self) -> None:
        """Ends the sleep of all ranks, or the next one if this rank is awake. To be called *after* the work has been
        put where ``begin`` will find it. Sets a flag when awake, takes one round trip to the store when asleep."""

    def stop(self) -> None:
        """Wakes all ranks; every agreement of theirs says stop from this rank's next one on."""

    def close(self) -> None:
        """Ends the sleep of this rank for good. Over a group all ranks wake, to find that this one has left."""


class SoloLockstep:
    """A group of one rank: nobody to agree with."""

    def __init__(self) -> None:
        self._step = 0
        self._stopping = self._closed = False
        self._woken = threading.Event()

    def begin(self, inbox: list[bytes], now: float) -> tuple[list[bytes], float]:
        if self._closed:  # there is no collective that would break
            raise GroupBroken(_CLOSED)
        return inbox, now

    def agree(self, num_tokens: int, note: Note = NOTHING) -> StepAgreement:
        agreement = StepAgreement(self._step, (num_tokens,), (self._stopping,), (note,))
        self._step += 1
        return agreement

    def gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def broadcast(self, data: bytes, root: int, num_bytes: int) -> bytes:
        return data

    def sleep(self) -> None:
        self._woken.wait()
        if self._closed:
            raise GroupBroken(_CLOSED)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._stopping = True
        self.wake()

    def close(self) -> None:
        self._closed = True
        self.wake()


class GroupLockstep:
    """Lockstep over a mesh's control groups and two clients of the group's store: one that waits, one that wakes."""

    def __init__(self, mesh: Mesh, address: StoreAddress, *, timeout_s: float = 60.0) -> None:
        self._control = mesh.control
        self._tp_control = mesh.tp_control
        self._tp = mesh.shape.tp
        prefix = f"epoch/{mesh.epoch}/wake"
        self._waiter = address.connect(timeout_s, prefix)
        self._waker = address.connect(timeout_s, prefix)
        self._step = 0
        self._sleeps = 0  # sleeps ended, and so the number of the current or next one
        self._lock = threading.Lock()  # guards the four below
        self._asleep = False
        self._woken = False  # somebody called wake since the last sleep ended
        self._stopping = False
        self._closed = False

    def begin(self, inbox: list[bytes], now: float) -> tuple[list[bytes], float]:
        if self._tp_control is None:
            return inbox, now
        return share_inbox(self._tp_control, inbox, now)

    def agree(self, num_tokens: int, note: Note = NOTHING) -> StepAgreement:
        mine = torch.tensor([self._step, num_tokens, self._stopping, *note], dtype=torch.int64)
        rows = self._control.all_gather(mine).tolist()
        steps, tokens, stopping, *notes = zip(*rows, strict=True)
        if len(set(steps)) > 1:
            raise LockstepBroken(f"ranks are in different steps: {list(steps)}")
        for leader in range(0, len(tokens), self._tp):
            if len(set(tokens[leader : leader + self._tp])) > 1:
                raise LockstepBroken(
                    f"step {self._step}: the tensor-parallel ranks from {leader} on planned different numbers of "
                    f"tokens: {list(tokens[leader : leader + self._tp])}"
                )
        self._step += 1
        return StepAgreement(
            steps[0], tuple(tokens), tuple(map(bool, stopping)), tuple(map(Note._make, zip(*notes, strict=True)))
        )

    def gather(self, x: Tensor) -> Tensor:
        return self._control.all_gather(x)

    def broadcast(self, data: bytes, root: int, num_bytes: int) -> bytes:
        leads = self._control.rank == root
        buffer = torch.frombuffer(bytearray(data if leads else bytes(num_bytes)), dtype=torch.uint8)
        return bytes(self._control.broadcast_(buffer, root).numpy())

    def sleep(self) -> None:
        key = str(self._sleeps)
        with self._lock:
            self._asleep = True
            woken = self._woken
        try:
            if woken:
                self._waiter.set(key, "")
            self._waiter.wait([key], _FOREVER)
        except DistError as error:
            raise GroupBroken(str(error)) from error
        finally:
            with self._lock:
                self._asleep = self._woken = False
                self._sleeps += 1
        if self._closed:
            raise GroupBroken(_CLOSED)
        # Every rank has left sleep n - 1, or it could not have agreed on this one; nobody will ask for its key again.
        if self._control.rank == 0 and self._sleeps > 1:
            self._waiter.delete_key(str(self._sleeps - 2))

    def wake(self) -> None:
        with self._lock:
            if self._asleep and not self._woken:
                try:
                    self._waker.set(str(self._sleeps), "")
                except DistError as error:  # whoever sleeps is told the same
                    log.warning("the store of the group is gone: %s", error)
            self._woken = True

    def stop(self) -> None:
        self._stopping = True
        self.wake()

    def close(self) -> None:
        self._closed = True
        self.wake()


def make_lockstep(mesh: Mesh, address: StoreAddress, *, timeout_s: float = 60.0) -> Lockstep:
    """The lockstep for a mesh: alone when the group has one rank. ``timeout_s`` bounds connecting to the store."""
    if mesh.shape.world_size == 1:
        return SoloLockstep()
    return GroupLockstep(mesh, address, timeout_s=timeout_s)


def share_inbox(collectives: Collectives, inbox: list[bytes], now: float) -> tuple[list[bytes], float]:
    """Rank 0's messages and clock, on every rank of ``collectives``."""
    leads = collectives.rank == 0
    packed = b"".join(_LENGTH.pack(len(message)) + message for message in inbox) if leads else b""
    first = torch.zeros(INLINE_BYTES, dtype=torch.uint8)
    if leads:
        head = _HEAD.pack(now, len(packed)) + packed[: INLINE_BYTES - _HEAD.size]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    received = bytes(collectives.broadcast_(first, root=0).numpy())
    now, total = _HEAD.unpack_from(received)
    if _HEAD.size + total <= INLINE_BYTES:
        packed = received[_HEAD.size : _HEAD.size + total]
    else:
        rest = torch.frombuffer(bytearray(packed if leads else bytes(total)), dtype=torch.uint8)
        packed = bytes(collectives.broadcast_(rest, root=0).numpy())
    return list(_messages(packed)), now


def _messages(packed: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(packed):
        (length,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size + length
        yield packed[at - length : at]
