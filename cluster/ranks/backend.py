"""The backend of a cluster: keeps a link to every rank the directory knows, and picks one for each request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.cluster.backend import Capacity, unknown_rank
from moestro.cluster.delta_streams import QueuedDeltas
from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.ranks.capacity import joint
from moestro.cluster.ranks.link import OpenChannel, RankLink, engine_name, open_channel
from moestro.protos.errors import Overloaded, Unavailable
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceRequest

log = logging.getLogger(__name__)

DEATH_S = 2.0  # the directory has told of a process that ended long before
RETRY_S = 0.5  # a lost rank is tried again so often while the directory still names it


def least_loaded(
    open_sequences: Sequence[int], waiting: Sequence[int], turn: int, slowness: Sequence[float] | None = None
) -> int:
    """Index of the rank to take the next request: fewest sequences of ours open there plus its whole waiting line,
    equal ones in turn, so that an idle cluster is used evenly. A rank that takes so many times longer for the same work
    than others, ``slowness``, counts as that much fuller with the request than it is."""
    count = len(open_sequences)
    times = slowness or [1.0] * count
    return min(range(count), key=lambda i: ((open_sequences[i] + waiting[i] + 1) * times[i], (i - turn) % count))


def places(groups: Iterable[GroupEntry]) -> dict[str, tuple[str, ...]]:
    """The addresses of every group and rank by name: a tensor-parallel peer is served through its leader."""
    found = {}
    for group in groups:
        found[group.name] = tuple(rank.address for rank in group.ranks if rank.address)
        for number in range(len(group.ranks)):
            found[group.rank_name(number)] = (group.leader(number).address,)
    return found


@dataclass(frozen=True, slots=True)
class Standing:
    """How a rank stands in the directory's picture."""

    group: str
    epoch: int
    state: RankState
    forming: bool

    @property
    def is_computing(self) -> bool:
        """Whether its end may have been a request's doing."""
        return self.state is RankState.SERVING and not self.forming


def standings(groups: Iterable[GroupEntry]) -> dict[str, Standing]:
    """Of every rank that gateways can talk to, by address."""
    return {
        rank.address: Standing(group.name, group.epoch, rank.state, group.forming)
        for group in groups
        for rank in group.ranks
        if rank.address
    }


class ClusterBackend:
    """Implements ``Backend`` over rank links, for one of so many gateways. All methods on one asyncio loop."""

    def __init__(
        self, gateway_id: str, secret: str, open_channel: OpenChannel = open_channel, *, gateways: int = 1
    ) -> None:
        self._gateway_id = gateway_id
        self._secret = secret
        self._gateways = gateways
        self._open_channel = open_channel
        self._wanted: dict[str, Standing] = {}  # by address
        self._links: dict[str, RankLink] = {}  # of ranks that may take requests
        self._leaving: dict[str, RankLink] = {}  # of those that only finish what they have
        self._places: dict[str, tuple[str, ...]] = {}  # name of a group or rank -> addresses
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._unreachable: set[str] = set()  # of those: their connection was lost, or could not be made
        self._closing: dict[asyncio.Task[None], None] = {}
        self._limits: EngineLimits | None = None
        self._attached = asyncio.Event()
        self._changed = asyncio.Event()  # replaced when it is set: there is another picture, or another link
        self._turn = 0
        self._num_links = 0  # ever made

    @property
    def limits(self) -> EngineLimits:
        if self._limits is None:
            raise Unavailable("no rank is serving yet")
        return self._limits

    def capacity(self) -> Capacity:
        """Of the attached ranks together. Raises Unavailable when there is none."""
        return joint(link.capacity(self._gateways) for link in self._links_of(""))

    def start(self, sequences: Sequence[SequenceRequest]) -> QueuedDeltas:
        links = self._links_of(sequences[0].diagnostics.rank)
        links = [link for link in links if not link.load.is_shedding]
        if not links:
            raise Overloaded("memory runs short: nothing new is taken")
        self._turn += 1
        index = least_loaded(
            [link.num_open for link in links],
            [link.load.num_waiting for link in links],
            self._turn % len(links),
            [link.load.slowness for link in links],
        )
        return links[index].start(sequences)

    def loads(self) -> dict[str, EngineLoad]:
        """The last known load of every attached rank, by address."""
        return {address: link.load for address, link in self._links.items()}

    def unreachable(self) -> frozenset[str]:
        """The addresses of ranks that serve, as the directory has it, and cannot be reached from here."""
        return frozenset(self._unreachable)

    def attached_groups(self) -> frozenset[str]:
        """The groups to whose ranks there are connections."""
        return frozenset(link.group for link in [*self._links.values(), *self._leaving.values()])

    def link_of(self, address: str) -> RankLink | None:
        """The link to the rank at an address, None while it is not attached."""
        return self._links.get(address)

    def update(self, groups: Iterable[GroupEntry]) -> None:
        """Takes a new picture of the cluster. Attaches to ranks that serve. One that drains, or whose group has left,
        gets no more requests and may finish those it has; those of one that is lost go on elsewhere at once."""
        groups = tuple(groups)
        self._places = places(groups)
        present, named = standings(groups), {group.name for group in groups}
        self._wanted = {address: each for address, each in present.items() if each.state is RankState.SERVING}
        for address, link in [*self._links.items(), *self._leaving.items()]:
            standing = present.get(address)
            if link.group in named if standing is None else standing.state is RankState.LOST:
                self._let_go(link, link.break_off("its group goes on without it"))
                continue
            link.is_computing = standing is not None and standing.is_computing
            if address not in self._wanted and address not in self._leaving:
                self._let_go(link, link.close_when_done())
                self._leaving[address] = link
        self._notify()
        for address in [each for each in self._connecting if each not in self._wanted]:
            self._connecting[address].cancel()
        self._unreachable.intersection_update(self._wanted)
        for address in self._wanted:
            if address not in self._links and address not in self._connecting:
                self._connecting[address] = asyncio.create_task(self._connect(address))

    def _let_go(self, link: RankLink, farewell: Coroutine[Any, Any, None]) -> None:
        """Nothing new goes there."""
        log.info("rank at %s left", link.address)
        self._links.pop(link.address, None)
        self._leaving.pop(link.address, None)
        if not self._links:
            self._attached.clear()
        self._closing[task := asyncio.create_task(farewell)] = None
        task.add_done_callback(lambda task: self._closing.pop(task, None))

    async def available(self) -> None:
        await self._attached.wait()

    async def outlived(self, engine: str) -> bool:
        """As ``Backend``: it lives when it can be reached again, or the directory still names it after a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_S):
                while address := self._address_of(engine):
                    if address in self._links:
                        return True
                    await self._changed.wait()
                return False
        return True

    def _address_of(self, engine: str) -> str:
        """Where an engine serves, as the directory has it; "" if it does not."""
        names = ((engine_name(each.group, address), address) for address, each in self._wanted.items())
        return next((address for name, address in names if name == engine), "")

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_attached(self) -> None:
        """Returns when at least one rank can take requests."""
        await self._attached.wait()

    async def close(self) -> None:
        self._wanted = {}
        for task in self._connecting.values():
            task.cancel()
        for task in self._closing:
            task.cancel()
        for link in [*self._links.values(), *self._leaving.values()]:
            await link.close()

    def _links_of(self, place: str) -> list[RankLink]:
        """Those that may take a request: every one, or those of a rank or group."""
        if not place:
            links, described = list(self._links.values()), "no rank"
        elif place in self._places:
            links = [self._links[address] for address in self._places[place] if address in self._links]
            described = f"no rank of {place!r}"
        else:
            raise unknown_rank(place, list(self._places))
        if not links:
            raise Unavailable(f"{described} is serving now")
        return links

    async def _connect(self, address: str) -> None:
        try:
            while address in self._wanted:
                standing = self._wanted[address]
                self._num_links += 1  # a rank may not have noticed yet that the last one broke
                name = f"{self._gateway_id}.{self._num_links}"
                link = RankLink(address, name, self._secret, standing.epoch, self._on_lost, self._open_channel)
                link.group = standing.group
                try:
                    self._limits = await link.connect()
                except Unavailable as error:
                    log.warning("%s", error)
                    self._unreachable.add(address)
                    await link.close()
                    await asyncio.sleep(RETRY_S)
                    continue
                except asyncio.CancelledError:
                    await link.close()
                    raise
                self._links[address] = link
                self._unreachable.discard(address)
                self._attached.set()
                self._notify()
                return
        finally:
            if self._connecting.get(address) is asyncio.current_task():
                del self._connecting[address]

    def _on_lost(self, link: RankLink) -> None:
        if self._leaving.get(link.address) is link:
            del self._leaving[link.address]
        if self._links.get(link.address) is link:
            del self._links[link.address]
            if not self._links:
                self._attached.clear()
            if link.address in self._wanted:
                self._unreachable.add(link.address)
                self._connecting[link.address] = asyncio.create_task(self._connect(link.address))
