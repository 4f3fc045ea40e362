"""Which faults come when: a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class Kind(Enum):
    """What is done to the cluster. What lasts is undone after the fault's seconds."""

    KILL_RANK = "kill rank"  # SIGKILL
    KILL_TWO_RANKS = "kill two ranks"  # within a moment
    STOP_RANK = "stop rank"  # SIGSTOP, and SIGCONT if it is still there: it must not go on in its old epoch
    SLOW_RANK = "slow rank"  # runs a fifth of the time
    PARTITION = "partition"  # reaches nobody and nobody reaches it
    FULL_DISK = "full disk"  # nothing more can be written where the cluster writes
    KILL_GATEWAY = "kill gateway"
    KILL_SUPERVISOR = "kill supervisor"  # the process that watches over a group
    KILL_DIRECTORY = "kill directory"
    KILL_HEAD = "kill head"  # Ray's, with all it runs


# How often one is drawn against the others, and how long it lasts: from, to, in seconds.
WEIGHTS: Mapping[Kind, float] = {
    Kind.KILL_RANK: 6.0,
    Kind.KILL_TWO_RANKS: 1.0,
    Kind.STOP_RANK: 2.0,
    Kind.SLOW_RANK: 1.0,
    Kind.PARTITION: 1.0,
    Kind.FULL_DISK: 0.5,
    Kind.KILL_GATEWAY: 1.0,
    Kind.KILL_SUPERVISOR: 0.5,
    Kind.KILL_DIRECTORY: 1.0,
    Kind.KILL_HEAD: 0.25,
}
LASTS_S: Mapping[Kind, tuple[float, float]] = {
    Kind.STOP_RANK: (1.0, 10.0),  # the shortest end before anybody has noticed
    Kind.SLOW_RANK: (4.0, 12.0),
    Kind.PARTITION: (5.0, 10.0),
    Kind.FULL_DISK: (5.0, 10.0),
}
IMPATIENT = 0.25  # of the faults come before the cluster is whole again


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. It comes ``after_s`` seconds after the cluster is whole again, or, when ``impatient``, after the one
    before it. ``draw`` in [0, 1) chooses whom it hits."""

    number: int
    kind: Kind
    after_s: float
    impatient: bool
    draw: float
    lasts_s: float = 0.0

    def choose(self, among: Sequence[T]) -> T:
        return among[int(self.draw * len(among))]


def faults(seed: int, kinds: Sequence[Kind], pause_s: tuple[float, float] = (0.5, 3.0)) -> Iterator[Fault]:
    """Faults of these kinds without end, ``pause_s`` apart."""
    rng = random.Random(f"chaos faults {seed}")
    weights = [WEIGHTS[kind] for kind in kinds]
    number = 0
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield Fault(
            number=number,
            kind=kind,
            after_s=rng.uniform(*pause_s),
            impatient=number > 0 and rng.random() < IMPATIENT,
            draw=rng.random(),
            lasts_s=rng.uniform(*LASTS_S.get(kind, (0.0, 0.0))),
        )
        number += 1
