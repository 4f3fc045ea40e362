"""The Python client, sync and async.

    from moestro.cluster.client import Client
    with Client("localhost:50051") as client:
        print(client.generate("def f(").text)

Errors are those of ``protos.errors`` (InvalidRequest with every violated field, Overloaded, Unavailable, ...), and
TimeoutError when a deadline passes. A call that fails with Unavailable is tried again after the time the server names,
unless some of its answer has arrived. Imports neither torch nor ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from moestro.cluster import client_calls as calls
from moestro.cluster.client_calls import CHANNEL_OPTIONS, Attempts, Call, Messages, Options
from moestro.cluster.client_results import ClusterStatus, GroupExperts, Incident, ModelInfo, ServerInfo
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.protos.experts import PlacementRequest

__all__ = ["AsyncClient", "Client", "Completion", "Options", "StreamEvent"]

T = TypeVar("T")


class Client:
    """Talks to one gateway. Usable from several threads. ``timeout_s`` is the deadline of calls that name none."""

    def __init__(self, address: str = "localhost:50051", timeout_s: float | None = None, retries: int = 2) -> None:
        self._channel: Any = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._timeout_s, self._retries = timeout_s, retries

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Completion:
        """Continues a prompt (text or token ids) and returns the whole answer."""
        return self._unary(calls.generate(prompt, options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Iterator[StreamEvent]:
        """Continues a prompt, event by event. Leaving the loop early cancels the request."""
        return self._stream(calls.stream(prompt, options))

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Continues a conversation and returns the whole answer."""
        return gather(self._stream(calls.chat(messages, options)))

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> Iterator[StreamEvent]:
        """Continues a conversation, event by event."""
        return self._stream(calls.chat(messages, options))

    def tokenize(self, text: str, model: str = "", add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        return self._unary(calls.tokenize(text, model, add_special_tokens))

    def detokenize(self, token_ids: Sequence[int], model: str = "", skip_special_tokens: bool = False) -> str:
        """Token ids to text."""
        return self._unary(calls.detokenize(token_ids, model, skip_special_tokens))

    def models(self) -> list[ModelInfo]:
        """The models served here."""
        return self._unary(calls.models())

    def info(self) -> ServerInfo:
        """Version and limits of the gateway."""
        return self._unary(calls.info())

    def status(self) -> ClusterStatus:
        """Groups, ranks, load and KV use."""
        return self._unary(calls.status())

    def experts(self, group: str = "") -> tuple[GroupExperts, ...]:
        """Where experts lie, what they compute and what the rebalancer decided; of one group, or of all that serve."""
        return self._unary(calls.experts(group))

    def set_placement(self, request: PlacementRequest, group: str = "") -> tuple[str, ...]:
        """Asks one group, or all that serve, to move experts in the background; returns those that have begun."""
        return self._unary(calls.set_placement(request, group))

    def incidents(self, name: str = "") -> tuple[Incident, ...]:
        """Requests that this gateway tries no more, since ranks died each time they ran; one by name, or all."""
        return self._unary(calls.incidents(name))

    def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        while True:
            try:
                method = self._channel.unary_unary(call.path)
                return call.decode(method(call.data, timeout=attempts.remaining_s))
            except grpc.RpcError as failure:
                time.sleep(attempts.pause_after(failure))

    def _stream(self, call: Call[T]) -> Iterator[T]:
        attempts = self._attempts(call)
        started = False
        while True:
            responses = self._channel.unary_stream(call.path)(call.data, timeout=attempts.remaining_s)
            try:
                for data in responses:
                    started = True
                    yield call.decode(data)
                return
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure, started)
            finally:
                responses.cancel()
            time.sleep(pause_s)

    def _attempts(self, call: Call[T]) -> Attempts:
        return Attempts(self._retries, self._timeout_s if call.timeout_s is None else call.timeout_s)


class AsyncClient:
    """The same on an event loop: ``async with AsyncClient() as client: async for event in client.stream(...)``."""

    def __init__(self, address: str = "localhost:50051", timeout_s: float | None = None, retries: int = 2) -> None:
        self._channel: Any = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._timeout_s, self._retries = timeout_s, retries

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Completion:
        """Continues a prompt (text or token ids) and returns the whole answer."""
        return await self._unary(calls.generate(prompt, options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> AsyncIterator[StreamEvent]:
        """Continues a prompt, event by event. Closing the iterator, or cancelling its task, cancels the request."""
        return self._stream(calls.stream(prompt, options))

    async def chat(self, messages: Messages, **options: Unpack[Options]) -> Completion:
        """Continues a conversation and returns the whole answer."""
        return gather([event async for event in self._stream(calls.chat(messages, options))])

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> AsyncIterator[StreamEvent]:
        """Continues a conversation, event by event."""
        return self._stream(calls.chat(messages, options))

    async def tokenize(self, text: str, model: str = "", add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        return await self._unary(calls.tokenize(text, model, add_special_tokens))

    async def detokenize(self, token_ids: Sequence[int], model: str = "", skip_special_tokens: bool = False) -> str:
        """Token ids to text."""
        return await self._unary(calls.detokenize(token_ids, model, skip_special_tokens))

    async def models(self) -> list[ModelInfo]:
        """The models served here."""
        return await self._unary(calls.models())

    async def info(self) -> ServerInfo:
        """Version and limits of the gateway."""
        return await self._unary(calls.info())

    async def status(self) -> ClusterStatus:
        """Groups, ranks, load and KV use."""
        return await self._unary(calls.status())

    async def experts(self, group: str = "") -> tuple[GroupExperts, ...]:
        """Where experts lie, what they compute and what the rebalancer decided; of one group, or of all that serve."""
        return await self._unary(calls.experts(group))

    async def set_placement(self, request: PlacementRequest, group: str = "") -> tuple[str, ...]:
        """Asks one group, or all that serve, to move experts in the background; returns those that have begun."""
        return await self._unary(calls.set_placement(request, group))

    async def incidents(self, name: str = "") -> tuple[Incident, ...]:
        """Requests that this gateway tries no more, since ranks died each time they ran; one by name, or all."""
        return await self._unary(calls.incidents(name))

    async def close(self) -> None:
        """Closes the connection; open streams are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        while True:
            try:
                method = self._channel.unary_unary(call.path)
                return call.decode(await method(call.data, timeout=attempts.remaining_s))
            except grpc.RpcError as failure:
                await asyncio.sleep(attempts.pause_after(failure))

    async def _stream(self, call: Call[T]) -> AsyncIterator[T]:
        attempts = self._attempts(call)
        started = False
        while True:
            responses = self._channel.unary_stream(call.path)(call.data, timeout=attempts.remaining_s)
            try:
                async for data in responses:
                    started = True
                    yield call.decode(data)
                return
            except grpc.RpcError as failure:
                pause_s = attempts.pause_after(failure, started)
            finally:
                responses.cancel()
            await asyncio.sleep(pause_s)

    def _attempts(self, call: Call[T]) -> Attempts:
        return Attempts(self._retries, self._timeout_s if call.timeout_s is None else call.timeout_s)
