"""The Python client on an event loop; see ``client``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from moestro.cluster import client_calls as calls
from moestro.cluster.client_attempts import Attempts, Route, addresses_of, error_from
from moestro.cluster.client_calls import CHANNEL_OPTIONS, Call, Messages, Options, StreamCall
from moestro.cluster.client_progress import Progress
from moestro.cluster.client_results import ClusterStatus, GroupExperts, Incident, ModelInfo, ServerInfo
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.request_ids import new_request_id
from moestro.protos.experts import PlacementRequest

T = TypeVar("T")


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


class AsyncClient:
    """The same on an event loop: ``async with AsyncClient() as client: async for event in client.stream(...)``."""

    def __init__(
        self,
        address: str | Sequence[str] = "localhost:50051",
        timeout_s: float | None = None,
        retries: int = 2,
        resume_s: float = 60.0,
        *,
        open_channel: Callable[[str], Any] = open_channel,
        new_request_id: Callable[[], str] = new_request_id,
    ) -> None:
        addresses = addresses_of(address)
        self._route = Route(addresses)
        self._channels: dict[str, Any] = {each: open_channel(each) for each in addresses}
        self._timeout_s, self._retries, self._resume_s = timeout_s, retries, resume_s
        self._new_request_id = new_request_id
        self._closed = False

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Completion:
        """Continues a prompt (text or token ids) and returns the whole answer."""
        return gather([event async for event in self._stream(calls.stream(prompt, options))])

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
        """Closes the connections; open streams are cancelled."""
        self._closed = True
        for channel in self._channels.values():
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(None)
        while True:
            address = self._route.address
            try:
                method = self._channels[address].unary_unary(call.path)
                return call.decode(await method(call.data, timeout=attempts.remaining_s))
            except grpc.RpcError as failure:
                pause_s = self._after(failure, address, attempts)
            await asyncio.sleep(pause_s)

    async def _stream(self, call: StreamCall) -> AsyncIterator[StreamEvent]:
        call.request.request_id = call.request.request_id or self._new_request_id()
        progress, attempts = Progress(call.request), self._attempts(call.timeout_s)
        while not progress.is_complete:
            address = self._route.address
            method = self._channels[address].unary_stream(call.path)
            responses = method(progress.data(), timeout=attempts.remaining_s)
            try:
                async for data in responses:
                    event = call.decode(data)
                    progress.take(event)
                    attempts.arrived()
                    yield event
                return
            except grpc.RpcError as failure:
                if progress.is_complete:
                    return
                pause_s = self._after(failure, address, attempts)
            finally:
                responses.cancel()
            await asyncio.sleep(pause_s)

    def _after(self, failure: grpc.RpcError, address: str, attempts: Attempts) -> float:
        if self._closed:
            raise error_from(failure) from failure
        return self._route.after(failure, address, attempts)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self._retries, self._resume_s, timeout_s, asyncio.get_running_loop().time)
