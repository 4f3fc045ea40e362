"""Messages between the processes of a cluster without Ray: JSON, one a line, over TCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.router.view import Member, View
from moestro.workers.worker_state import WorkerPhase, WorkerState

Message = dict[str, Any]
LONGEST = 2**20


class Line:
    """One connection. What is sent to a peer that is gone is lost; the reader hears of its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Message) -> None:
        with suppress(ConnectionError, RuntimeError):
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[Message]:
        """Until the other side is gone."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await self._reader.readline():
                yield json.loads(line)

    def close(self) -> None:
        self._writer.close()


async def connect(host: str, port: int) -> Line:
    return Line(*await asyncio.open_connection(host, port, limit=LONGEST))


def encode_state(state: WorkerState) -> Message:
    return {**asdict(state), "phase": state.phase.value}


def decode_state(message: Message) -> WorkerState:
    return WorkerState(**{**message, "phase": WorkerPhase(message["phase"])})


def encode_view(view: View) -> Message:
    return {"epoch": view.epoch, "members": [[each.seat, each.worker] for each in view.members], "tp": view.tp}


def decode_view(message: Message) -> View:
    members = tuple(Member(seat, worker) for seat, worker in message["members"])
    return View(message["epoch"], members, message["tp"])


def encode_group(group: GroupEntry) -> Message:
    return {**asdict(group), "ranks": [{**asdict(rank), "state": rank.state.value} for rank in group.ranks]}


def decode_group(message: Message) -> GroupEntry:
    ranks = tuple(RankEntry(**{**rank, "state": RankState(rank["state"])}) for rank in message["ranks"])
    return GroupEntry(**{**message, "ranks": ranks})
