"""Who is alive: the groups of the cluster, their ranks and how far they are, and the gateways. Sans-IO; the Ray side
wraps it. Times are seconds of one clock, given by the caller.

Holds nothing that groups and gateways do not tell again every second or so, so losing it loses nothing: a new one is
*settled* when everybody has had the time to tell again. Until then a group that it does not name may only not have
spoken yet, so nobody drops one (``Snapshot.over``) and none begins, whose name or epoch might be in use. One that has
heard nobody for a while was cut off itself, and starts anew in the same way.

A group that no longer reports gives up its name to the next one, but who is attached to its ranks stays: it may be only
the directory that does not hear it, and of a dead process its connections tell. When no gateway is attached any more it
has gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count

from moestro.cluster.membership_records import RecoveryTotals

EXPIRY_S = 10.0  # who has not reported for so long is silent
START_S = 120.0  # one that starts may be busy importing and not come to report
FORGET_S = 600.0  # a silent group to which gateways are attached all the same is let go of
DEAF_S = 3.0  # somebody asks or reports several times a second
SETTLE_S = 6.0  # groups report every half second and gateways every two, once they have found the new directory


class RankState(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
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
    """One copy of the model, with a seat for each of ``dp × tp`` ranks; it serves with those that serve. ``epoch`` is
    the last in which all members have come to serve. A message from an older one is refused."""

    name: str
    dp: int
    tp: int
    epoch: int = 0
    ranks: tuple[RankEntry, ...] = ()  # by seat
    forming: bool = False  # between two views: nothing is computed
    activity: str = ""  # in words, when it is not simply serving at full strength
    spare_ranks: int = 0  # how many more it could lose before the experts no longer fit the others
    recovery: RecoveryTotals = field(default_factory=RecoveryTotals)
    is_silent: bool = False  # the directory has not heard of it for a while

    @property
    def is_serving(self) -> bool:
        return any(rank.state is RankState.SERVING for rank in self.ranks)

    def rank_name(self, number: int) -> str:
        """What operators call a rank of this group."""
        return f"{self.name} rank {number}"

    def leader(self, number: int) -> RankEntry:
        """Who talks to gateways for a rank: the first of its tensor-parallel set."""
        return self.ranks[number - number % self.tp]

    @property
    def is_lost(self) -> bool:
        """Whether another group may take its name."""
        return self.is_silent or all(rank.state is RankState.LOST for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class GatewayEntry:
    """One gateway and where it listens."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """What a gateway knows and a directory may not. ``epochs``: the last it heard of each group, also of those that are
    gone. ``attached``: the groups to whose ranks it has connections."""

    epochs: Mapping[str, int] = field(default_factory=dict)
    attached: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the directory knew at one version: groups and gateways, each by name."""

    version: int
    groups: tuple[GroupEntry, ...]
    gateways: tuple[GatewayEntry, ...]
    settled: bool = True

    def over(self, known: Iterable[GroupEntry]) -> tuple[GroupEntry, ...]:
        """The groups to go by for one who knew ``known``: all of those, too, while the directory is not settled."""
        if self.settled:
            return self.groups
        groups = {group.name: group for group in known}
        for group in self.groups:
            if group.name not in groups or groups[group.name].epoch <= group.epoch:
                groups[group.name] = group
        return tuple(groups[name] for name in sorted(groups))


@dataclass
class Directory:
    """A versioned table of groups and gateways. Every change that a gateway must know of raises ``version``.

    ``expected``: the groups that ran when this directory came up, None when nobody could say. It settles when they all
    have reported, and by the clock when one does not, or when any might be there."""

    expected: frozenset[str] | None = frozenset()
    born_s: float = 0.0
    settled: bool = field(init=False)
    version: int = 0
    groups: dict[str, GroupEntry] = field(default_factory=dict)
    gateways: dict[str, GatewayEntry] = field(default_factory=dict)
    attached: dict[str, frozenset[str]] = field(default_factory=dict)  # groups, by gateway
    epochs: dict[str, int] = field(default_factory=dict)
    seen_s: dict[str, float] = field(default_factory=dict)  # last report, by name
    heard_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.settled = self.expected is not None and not self.expected
        self.heard_s = self.born_s

    def hear(self, now_s: float) -> None:
        """Somebody calls, whatever for. The first after a silence tells that we were cut off: what we know is old."""
        if now_s - self.heard_s > DEAF_S:
            self.expected = frozenset(name for name, group in self.groups.items() if not group.is_lost)
            self.born_s = now_s
            self.settled = not self.expected
            self.version += 1
        self.heard_s = now_s

    def begin(self, dp: int, tp: int, now_s: float) -> GroupEntry:
        """A place for a new group: the lowest number that is free, or whose group is lost, at its next epoch.

        Whatever an earlier holder of that name still says is refused from now on. Raises RuntimeError when the
        directory is not settled.
        """
        if not self.settled:
            raise RuntimeError("the directory does not know yet which groups there are")
        names = (f"group-{number}" for number in count())
        name = next(name for name in names if name not in self.groups or self.groups[name].is_lost)
        ranks = tuple(RankEntry(rank // tp, rank % tp) for rank in range(dp * tp))
        group = GroupEntry(name, dp, tp, self.epochs.get(name, 0) + 1, ranks)
        self.put(group, now_s)
        return group

    def put(self, group: GroupEntry, now_s: float) -> bool:
        """Inserts or replaces a group. Says whether it was accepted: an entry of an older epoch is not."""
        latest = self.epochs.setdefault(group.name, group.epoch)
        if group.epoch < latest:
            return False
        self.epochs[group.name] = group.epoch
        self.seen_s[group.name] = now_s
        if self.groups.get(group.name) != group:
            self.groups[group.name] = group
            self.version += 1
        self._settle(now_s)
        return True

    def remove(self, name: str, epoch: int) -> None:
        """Forgets a group, unless a newer epoch of it has come meanwhile."""
        known = self.groups.get(name)
        if known is not None and known.epoch <= epoch:
            del self.groups[name]
            self.version += 1

    def put_gateway(self, gateway: GatewayEntry, report: GatewayReport, now_s: float) -> None:
        """Inserts or replaces a gateway. Epochs that it has seen are not used again, whatever became of the group."""
        self.seen_s[gateway.name] = now_s
        self.attached[gateway.name] = report.attached
        for name, epoch in report.epochs.items():
            self.epochs[name] = max(epoch, self.epochs.get(name, 0))
        if self.gateways.get(gateway.name) != gateway:
            self.gateways[gateway.name] = gateway
            self.version += 1

    def remove_gateway(self, name: str) -> None:
        """Forgets a gateway."""
        self.attached.pop(name, None)
        if self.gateways.pop(name, None) is not None:
            self.version += 1

    def expire(self, now_s: float) -> None:
        """Groups that no longer report are silent and later forgotten, gateways that do not are forgotten."""
        self._settle(now_s)
        if not self.settled:
            return
        for name, group in list(self.groups.items()):
            silent_s = now_s - self.seen_s[name]
            if silent_s > self._kept_s(group):
                self.remove(name, group.epoch)
            elif silent_s > EXPIRY_S and group.is_serving and not group.is_silent:
                self.groups[name] = replace(group, is_silent=True)
                self.version += 1
        for name in list(self.gateways):
            if now_s - self.seen_s[name] > EXPIRY_S:
                self.remove_gateway(name)

    def snapshot(self) -> Snapshot:
        """Everything, sorted by name."""
        return Snapshot(
            self.version,
            tuple(self.groups[name] for name in sorted(self.groups)),
            tuple(self.gateways[name] for name in sorted(self.gateways)),
            self.settled,
        )

    def _settle(self, now_s: float) -> None:
        since = {name for name in self.groups if self.seen_s[name] >= self.born_s}
        heard = self.expected is not None and self.expected <= since
        if not self.settled and (heard or now_s - self.born_s > SETTLE_S):
            self.settled = True
            self.version += 1

    def _kept_s(self, group: GroupEntry) -> float:
        """How long a group that does not report keeps its place."""
        if any(group.name in names for names in self.attached.values()):
            return FORGET_S
        return START_S if all(rank.state is RankState.STARTING for rank in group.ranks) else EXPIRY_S
