"""The backend of a cluster: keeps a link to every rank the directory knows, and picks one for each request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from moestro.cluster.backend import unknown_rank
from moestro.cluster.delta_streams import QueuedDeltas
from moestro.cluster.directory import GroupEntry
from moestro.cluster.ranks.link import OpenChannel, RankLink, open_channel
from moestro.protos.errors import Unavailable
from moestro.protos.sequences import EngineLimits, EngineLoad, SequenceRequest

log = logging.getLogger(__name__)

RETRY_S = 0.5  # a lost rank is tried again so often while the directory still names it


def least_loaded(open_sequences: Sequence[int], waiting: Sequence[int], turn: int) -> int:
    """Index of the rank to take the next request: fewest sequences of ours open there plus its whole waiting line,
    equal ones in turn, so that an idle cluster is used evenly."""
    count = len(open_sequences)
    return min(range(count), key=lambda i: (open_sequences[i] + waiting[i], (i - turn) % count))


def places(groups: Iterable[GroupEntry]) -> dict[str, tuple[str, ...]]:
    """The addresses of every group and rank by name: a tensor-parallel peer is served through its leader."""
    found = {}
    for group in groups:
        found[group.name] = tuple(rank.address for rank in group.ranks if rank.address)
        for number in range(len(group.ranks)):
            found[group.rank_name(number)] = (group.leader(number).address,)
    return found


class ClusterBackend:
    """Implements ``Backend`` over rank links. All methods on one asyncio loop."""

    def __init__(self, gateway_id: str, secret: str, open_channel: OpenChannel = open_channel) -> None:
        self._gateway_id = gateway_id
        self._secret = secret
        self._open_channel = open_channel
        self._wanted: dict[str, int] = {}  # address -> epoch
        self._links: dict[str, RankLink] = {}
        self._places: dict[str, tuple[str, ...]] = {}  # name of a group or rank -> addresses
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._limits: EngineLimits | None = None
        self._attached = asyncio.Event()
        self._turn = 0

    @property
    def limits(self) -> EngineLimits:
        if self._limits is None:
            raise Unavailable("no rank is serving yet")
        return self._limits

    def start(self, sequences: Sequence[SequenceRequest]) -> QueuedDeltas:
        links = self._links_of(sequences[0].diagnostics.rank)
        self._turn += 1
        index = least_loaded([x.num_open for x in links], [x.load.num_waiting for x in links], self._turn % len(links))
        return links[index].start(sequences)

    def loads(self) -> dict[str, EngineLoad]:
        """The last known load of every attached rank, by address."""
        return {address: link.load for address, link in self._links.items()}

    def link_of(self, address: str) -> RankLink | None:
        """The link to the rank at an address, None while it is not attached."""
        return self._links.get(address)

    def update(self, groups: Iterable[GroupEntry]) -> None:
        """Takes a new picture of the cluster: attaches to ranks that are new. One that is gone gets no more requests;
        those it has may end there, or be told when its connection breaks."""
        groups = tuple(groups)
        self._places = places(groups)
        wanted = {r.address: g.epoch for g in groups if g.is_serving for r in g.ranks if r.address}
        self._wanted = wanted
        for address in [each for each in self._links if each not in wanted]:
            link = self._links.pop(address)
            log.info("rank at %s left", address)
            self._leaving.add(task := asyncio.create_task(link.close_when_done()))
            task.add_done_callback(self._leaving.discard)
        if not self._links:
            self._attached.clear()
        for address in wanted:
            if address in self._links or address in self._connecting:
                continue
            self._connecting[address] = asyncio.create_task(self._connect(address))

    async def available(self) -> None:
        await self._attached.wait()

    async def wait_attached(self) -> None:
        """Returns when at least one rank can take requests."""
        await self._attached.wait()

    async def close(self) -> None:
        self._wanted = {}
        for task in self._connecting.values():
            task.cancel()
        for task in self._leaving:
            task.cancel()
        for link in list(self._links.values()):
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
                link = RankLink(
                    address, self._gateway_id, self._secret, self._wanted[address], self._on_lost, self._open_channel
                )
                try:
                    self._limits = await link.connect()
                except Unavailable as error:
                    log.warning("%s", error)
                    await link.close()
                    await asyncio.sleep(RETRY_S)
                    continue
                self._links[address] = link
                self._attached.set()
                return
        finally:
            self._connecting.pop(address, None)

    def _on_lost(self, link: RankLink) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]
            if not self._links:
                self._attached.clear()
            if link.address in self._wanted:
                self._connecting[link.address] = asyncio.create_task(self._connect(link.address))
