"""Calling an object of another process: its async methods over TCP, a line of JSON each way.

Arguments and results are what the annotations of a Protocol say; pydantic checks them on arrival. Nothing is pickled.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter

LONGEST = 2**22


class Refused(Exception):
    """What the other side raised, in words."""


@cache
def signature(protocol: type, name: str) -> tuple[tuple[TypeAdapter[Any], ...], TypeAdapter[Any]]:
    """Of a method: how its arguments and its result are written."""
    method = getattr(protocol, name)
    hints = get_type_hints(method)
    parameters = [each for each in inspect.signature(method).parameters if each != "self"]
    return tuple(TypeAdapter(hints[each]) for each in parameters), TypeAdapter(hints["return"])


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: object, protocol: type) -> None:
    """Carries out what the other side calls, each call in a task of its own, until it is gone."""
    tasks: set[asyncio.Task[None]] = set()
    with suppress(ConnectionError):
        while line := await reader.readline():
            tasks.add(task := asyncio.create_task(_one(json.loads(line), writer, target, protocol)))
            task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
    writer.close()


async def _one(message: dict[str, Any], writer: asyncio.StreamWriter, target: object, protocol: type) -> None:
    name = message["call"]
    takes, gives = signature(protocol, name)
    reply: dict[str, Any] = {"id": message["id"]}
    try:
        arguments = [adapter.validate_python(given) for adapter, given in zip(takes, message["with"], strict=True)]
        reply["result"] = gives.dump_python(await getattr(target, name)(*arguments), mode="json")
    except Exception as error:
        reply["error"] = f"{type(error).__name__}: {error}"
    with suppress(ConnectionError, RuntimeError):
        writer.write(json.dumps(reply).encode() + b"\n")


class Caller:
    """The calling side of one connection. Its attributes are the methods of the protocol. A call raises Refused with
    what the other side raised, or ConnectionError when it is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, protocol: type) -> None:
        self._reader, self._writer, self._protocol = reader, writer, protocol
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        self.reading = asyncio.create_task(self._read())  # done when the other side is gone

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    async def _call(self, name: str, *arguments: Any) -> Any:
        takes, gives = signature(self._protocol, name)
        if self.reading.done():
            raise ConnectionError("the other side is gone")
        self._count += 1
        number, future = self._count, asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        written = [adapter.dump_python(given, mode="json") for adapter, given in zip(takes, arguments, strict=True)]
        self._writer.write(json.dumps({"id": number, "call": name, "with": written}).encode() + b"\n")
        try:
            return gives.validate_python(await future)
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        self.reading.cancel()
        self._writer.close()

    async def _read(self) -> None:
        try:
            with suppress(ConnectionError):
                while line := await self._reader.readline():
                    reply = json.loads(line)
                    future = self._waiting.get(reply["id"])
                    if future is None or future.done():
                        continue
                    if "error" in reply:
                        future.set_exception(Refused(reply["error"]))
                    else:
                        future.set_result(reply["result"])
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionError("the other side is gone"))


class Redialling:
    """Calls to whoever listens at an address at that moment. A call raises ConnectionError while nobody does."""

    def __init__(self, address: tuple[str, int], protocol: type) -> None:
        self._address, self._protocol = address, protocol
        self._caller: Caller | None = None
        self._lock = asyncio.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    async def _call(self, name: str, *arguments: Any) -> Any:
        async with self._lock:
            if self._caller is None or self._caller.reading.done():
                self._caller = Caller(*await asyncio.open_connection(*self._address, limit=LONGEST), self._protocol)
        return await getattr(self._caller, name)(*arguments)
