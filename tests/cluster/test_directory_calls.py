"""The directory and those who follow it, on one loop: what is told, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from moestro.cluster.directory import GatewayEntry, GatewayReport, GroupEntry, RankEntry, RankState, Snapshot
from moestro.cluster.directory_calls import DirectoryServer
from moestro.cluster.directory_follower import DirectoryFollower

GATEWAY = GatewayEntry("gateway", "localhost:1")


def group(epoch: int, name: str = "group-0") -> GroupEntry:
    return GroupEntry(name, 1, 1, epoch, (RankEntry(0, 0, RankState.SERVING),))


class Replaceable(DirectoryServer):
    """One whose process can be lost and started again."""

    def __init__(self) -> None:
        super().__init__()
        self.is_lost = False

    def lose(self, *expected: str) -> None:
        """What it knew is gone."""
        super().__init__(frozenset(expected))

    async def watch(self, version: int) -> Snapshot:
        if self.is_lost:
            raise ConnectionError("the directory is away")
        return await super().watch(version)

    async def put_gateway(self, gateway: GatewayEntry, report: GatewayReport) -> None:
        if self.is_lost:
            raise ConnectionError("the directory is away")
        await super().put_gateway(gateway, report)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_a_gateway_keeps_what_it_knows_until_a_new_directory_has_heard_everybody() -> None:
    async def test() -> None:
        directory, seen = Replaceable(), list[tuple[GroupEntry, ...]]()
        follower = DirectoryFollower(directory, seen.append, frozenset)
        await directory.put(group(3))
        await directory.put(group(5, "group-1"))
        following = asyncio.create_task(follower.follow())
        await until(lambda: seen and seen[-1] == (group(3), group(5, "group-1")))
        directory.is_lost = True
        await asyncio.sleep(0.6)
        directory.lose("group-0", "group-1")
        directory.is_lost = False
        await directory.put(group(4))
        await until(lambda: seen[-1] == (group(4), group(5, "group-1")))
        await directory.put(group(6, "group-1"))
        await until(lambda: seen[-1] == (group(4), group(6, "group-1")))
        await directory.remove("group-1", 6)
        await until(lambda: seen[-1] == (group(4),))
        assert all(picture for picture in seen)
        following.cancel()

    run(test())


def test_a_gateway_remembers_the_epoch_of_a_group_that_has_gone() -> None:
    """Found by the simulator (seeds 100538, 100648): it forgot, and a new directory gave an epoch away again."""

    async def test() -> None:
        directory, seen = Replaceable(), list[tuple[GroupEntry, ...]]()
        follower = DirectoryFollower(directory, seen.append, frozenset)
        await directory.put(group(7))
        following = asyncio.create_task(follower.follow())
        await follower.arrive(GATEWAY)
        await until(lambda: seen and seen[-1] == (group(7),))
        await directory.remove("group-0", 7)
        await until(lambda: seen[-1] == ())
        directory.lose("group-1")  # who has not told yet, so the gateway has time to
        beginning = asyncio.create_task(directory.begin(1, 1))
        await asyncio.sleep(1.2)
        await directory.put(group(2, "group-1"))
        begun = await beginning
        assert (begun.name, begun.epoch) == ("group-0", 8)
        following.cancel()

    run(test())


def test_a_new_group_waits_for_a_settled_directory_and_gets_an_epoch_that_nobody_has_seen() -> None:
    async def test() -> None:
        directory = Replaceable()
        follower = DirectoryFollower(directory, lambda groups: None, frozenset)
        await directory.put(group(7))
        following = asyncio.create_task(follower.follow())
        await follower.arrive(GATEWAY)
        await asyncio.sleep(0.1)
        directory.lose("group-1")  # group-0 is gone together with the directory: only the gateway remembers it
        beginning = asyncio.create_task(directory.begin(1, 1))
        await asyncio.sleep(1.2)
        assert not beginning.done()
        await directory.put(group(2, "group-1"))
        begun = await beginning
        assert (begun.name, begun.epoch) == ("group-0", 8)
        assert (await directory.watch(-1)).gateways == (GATEWAY,)
        following.cancel()

    run(test())
