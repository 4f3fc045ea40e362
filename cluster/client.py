"""The Python client, sync and async.

    from moestro.cluster.client import Client
    with Client("localhost:50051") as client:
        print(client.generate("def f(").text)

Errors are those of ``protos.errors`` (InvalidRequest with every violated field, Overloaded, Unavailable, ...), and
TimeoutError when a deadline passes. A call that fails with Unavailable is tried again, at the next address where there
are several. A stream that was cut off goes on where it was: what is yielded has no gap and nothing twice. Imports
neither torch nor ray.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from moestro.cluster import client_calls as calls
from moestro.cluster.client_async import AsyncClient
from moestro.cluster.client_attempts import Attempts, Route, addresses_of, error_from
from moestro.cluster.client_calls import CHANNEL_OPTIONS, Call, Messages, Options, StreamCall
from moestro.cluster.client_progress import Progress
from moestro.cluster.client_results import ClusterStatus, GroupExperts, Incident, ModelInfo, ServerInfo
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.request_ids import new_request_id
from moestro.protos.experts import PlacementRequest

__all__ = ["AsyncClient", "Client", "Completion", "Options", "StreamEvent"]

T = TypeVar("T")


class Client:
    """Talks to one gateway at a time: ``address`` may name several (``"a:50051,b:50051"``, or a sequence), which are
    asked in turn when one fails. Usable from several threads.

    ``timeout_s`` is the deadline of calls that name none, retries included; ``retries`` how often a call is tried again
    that was refused or found nobody; ``resume_s`` how long one is tried again that was cut off.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "localhost:50051",
        timeout_s: float | None = None,
        retries: int = 2,
        resume_s: float = 60.0,
    ) -> None:
        addresses = addresses_of(address)
        self._route = Route(addresses)
        self._channels: dict[str, Any] = {a: grpc.insecure_channel(a, options=CHANNEL_OPTIONS) for a in addresses}
        self._timeout_s, self._retries, self._resume_s = timeout_s, retries, resume_s
        self._closed = False

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Completion:
        """Continues a prompt (text or token ids) and returns the whole answer."""
        return gather(self._stream(calls.stream(prompt, options)))

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
        """Closes the connections; open streams are cancelled."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, call: Call[T]) -> T:
        attempts = self._attempts(None)
        while True:
            address = self._route.address
            try:
                method = self._channels[address].unary_unary(call.path)
                return call.decode(method(call.data, timeout=attempts.remaining_s))
            except grpc.RpcError as failure:
                pause_s = self._after(failure, address, attempts)
            time.sleep(pause_s)

    def _stream(self, call: StreamCall) -> Iterator[StreamEvent]:
        call.request.request_id = call.request.request_id or new_request_id()
        progress, attempts = Progress(call.request), self._attempts(call.timeout_s)
        while not progress.is_complete:
            address = self._route.address
            method = self._channels[address].unary_stream(call.path)
            responses = method(progress.data(), timeout=attempts.remaining_s)
            try:
                for data in responses:
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
            time.sleep(pause_s)

    def _after(self, failure: grpc.RpcError, address: str, attempts: Attempts) -> float:
        if self._closed:
            raise error_from(failure) from failure
        return self._route.after(failure, address, attempts)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self._retries, self._resume_s, timeout_s, time.monotonic)
