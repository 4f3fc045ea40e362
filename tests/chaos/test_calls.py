"""Calls between the processes of the cluster without Ray."""

from __future__ import annotations

import asyncio
from typing import Protocol

import pytest
from benchmarks.chaos.plain.calls import Caller, Redialling, Refused, answer

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.router.view import Member, View


class Calls(Protocol):
    async def turn(self, view: View, held: tuple[tuple[int, ...], ...] | None) -> GroupEntry: ...

    async def fail(self, reason: str) -> None: ...

    async def hang(self) -> None: ...


class Target:
    async def turn(self, view: View, held: tuple[tuple[int, ...], ...] | None) -> GroupEntry:
        assert isinstance(view.members[0], Member)
        return GroupEntry(str(held), 1, 1, view.epoch, (RankEntry(0, 0, RankState.SERVING, "here"),))

    async def fail(self, reason: str) -> None:
        raise ValueError(reason)

    async def hang(self) -> None:
        await asyncio.Event().wait()


async def serve(port: int = 0) -> asyncio.Server:
    return await asyncio.start_server(lambda r, w: answer(r, w, Target(), Calls), "127.0.0.1", port)


def port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


def test_values_come_as_they_were_and_errors_as_words() -> None:
    async def run() -> None:
        server = await serve()
        caller = Caller(*await asyncio.open_connection("127.0.0.1", port_of(server)), Calls)
        view = View(7, (Member(0, 3), Member(2, 1)))
        got = await caller.turn(view, ((1, 2), (3,)))
        assert got == GroupEntry("((1, 2), (3,))", 1, 1, 7, (RankEntry(0, 0, RankState.SERVING, "here"),))
        assert (await caller.turn(view, None)).name == "None"
        with pytest.raises(Refused, match="ValueError: no"):
            await caller.fail("no")
        caller.close()
        server.close()

    asyncio.run(run())


def test_who_waits_hears_that_the_other_side_is_gone() -> None:
    async def run() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await reader.readline()
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        caller = Caller(*await asyncio.open_connection("127.0.0.1", port_of(server)), Calls)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(caller.hang(), 5.0)
        with pytest.raises(ConnectionError):
            await caller.fail("later")
        server.close()

    asyncio.run(run())


def test_the_next_one_at_the_same_address_is_found() -> None:
    async def run() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await answer(reader, writer, Target(), Calls)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = port_of(server)
        directory = Redialling(("127.0.0.1", port), Calls)
        view = View(1, (Member(0, 0),))
        await directory.turn(view, None)
        server.close()
        writers[0].close()
        await asyncio.sleep(0.1)
        with pytest.raises(OSError):
            await directory.turn(view, None)
        server = await serve(port)
        assert (await directory.turn(view, None)).epoch == 1
        server.close()

    asyncio.run(run())
