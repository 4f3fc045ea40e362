"""Who is alive: the groups of the cluster, their ranks and how far they are. Sans-IO; the Ray side wraps it.

Holds nothing that the groups could not tell again, so losing it loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class RankState(Enum):
    STARTING = "starting"
    SERVING = "serving"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class RankEntry:
    """One rank. ``address`` is empty for tensor-parallel peers: only the leader of a set talks to gateways."""

    dp_rank: int
    tp_rank: int
    state: RankState = RankState.STARTING
    address: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0
    device: str = ""
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One copy of the model on ``dp × tp`` ranks. A message from an older epoch is refused."""

    name: str
    dp: int
    tp: int
    epoch: int = 0
    ranks: tuple[RankEntry, ...] = ()

    @property
    def is_serving(self) -> bool:
        return bool(self.ranks) and all(rank.state is RankState.SERVING for rank in self.ranks)


@dataclass
class Directory:
    """A versioned table of groups. Every change that a gateway must know of raises ``version``."""

    version: int = 0
    groups: dict[str, GroupEntry] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)

    def begin_epoch(self, name: str) -> int:
        """The next epoch of a group."""
        self.epochs[name] = self.epochs.get(name, 0) + 1
        return self.epochs[name]

    def put(self, group: GroupEntry) -> bool:
        """Inserts or replaces a group. Says whether anything changed; an entry of an older epoch changes nothing."""
        latest = self.epochs.setdefault(group.name, group.epoch)
        if group.epoch < latest or self.groups.get(group.name) == group:
            return False
        self.epochs[group.name] = group.epoch
        self.groups[group.name] = group
        self.version += 1
        return True

    def remove(self, name: str, epoch: int) -> bool:
        """Forgets a group, unless a newer epoch of it has come meanwhile."""
        known = self.groups.get(name)
        if known is None or known.epoch > epoch:
            return False
        del self.groups[name]
        self.version += 1
        return True

    def snapshot(self) -> tuple[GroupEntry, ...]:
        """Every group, by name."""
        return tuple(self.groups[name] for name in sorted(self.groups))
