"""Who makes up a group in one epoch.

A group has as many *seats* as ranks at full strength. A *worker* is a process, with a number that is never used again
in its group; it takes a seat, and when it is lost another worker takes the seat later. A *view* is the workers of one
epoch in the order of their seats: a worker's place in it is its rank. (View and member are the words of virtual
synchrony, Birman and Joseph 1987.)
"""

from __future__ import annotations

from dataclasses import dataclass

from moestro.router.parallel import GroupShape


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A worker in its seat. Seats ``s * tp`` to ``s * tp + tp - 1`` are one tensor-parallel set."""

    seat: int
    worker: int


@dataclass(frozen=True, slots=True)
class View:
    """The members of one epoch by rank. Tensor-parallel sets are whole or absent.

    Raises ValueError for members out of order, two in one seat, or a set that is not whole."""

    epoch: int
    members: tuple[Member, ...]
    tp: int = 1

    def __post_init__(self) -> None:
        seats = [member.seat for member in self.members]
        if sorted(set(seats)) != seats or not seats:
            raise ValueError(f"members: seats must ascend, each once, at least one; got {seats}")
        wanted = [first + peer for first in seats[:: self.tp] for peer in range(self.tp)]
        if seats != wanted or any(first % self.tp for first in seats[:: self.tp]):
            raise ValueError(f"members: tensor-parallel sets of {self.tp} must be whole; got seats {seats}")

    @property
    def shape(self) -> GroupShape:
        return GroupShape(len(self.members) // self.tp, self.tp)

    def rank_of(self, worker: int) -> int | None:
        """The rank of a worker, None if it is no member."""
        return next((rank for rank, member in enumerate(self.members) if member.worker == worker), None)
