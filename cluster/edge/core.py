"""The request core: validate, admit, tokenise, start, stream. Knows no transport.

gRPC and HTTP servers and in-process callers give it the public messages and get typed events; what goes wrong is an
exception of ``protos.errors``, or TimeoutError when the caller's deadline passes. However a stream ends, nothing of it
keeps running in the backend; what was sent of it is remembered for a while, for a caller that comes back for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from math import inf
from typing import ParamSpec, TypeVar

from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.admitted import Admitted, settle
from moestro.cluster.edge.admitting import Admitting
from moestro.cluster.edge.callers import NOBODY, Caller, ask_for
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.history import Arrived
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.parking import Parking
from moestro.cluster.edge.permits import Permits
from moestro.cluster.edge.request_ids import new_request_id
from moestro.cluster.edge.request_stream import RequestStream
from moestro.cluster.edge.run import Recovery, Run
from moestro.cluster.edge.served import EdgeLimits, ServedModel, TextModel
from moestro.cluster.edge.tickets import Refusal
from moestro.cluster.edge.validation import ValidRequest, validate_chat, validate_generate, validate_token_ids
from moestro.protos.errors import FieldViolation, InvalidRequest, Overloaded, UnknownModel
from moestro.protos.gen import inference_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")


class RequestCore:
    """Serves the requests of one edge process, on one event loop."""

    def __init__(self, models: Sequence[ServedModel], limits: EdgeLimits | None = None) -> None:
        if not models:
            raise ValueError("an edge without a model")
        self.limits = limits or EdgeLimits()
        self.models = {model.name: model for model in models}
        self.recovery = Recovery(self.limits.recovery)
        self._open: dict[str, RequestStream] = {}  # by request id
        self._admitting: dict[str, Admitting] = {}
        self._parking = Parking(self.limits.recovery)
        self._num_text_calls = 0
        self.permits = {
            model.name: Permits(Admission(self.limits.admission), model.backend.capacity) for model in models
        }

    @property
    def num_queued(self) -> int:
        """Requests taken in and not yet started."""
        return sum(permits.num_queued for permits in self.permits.values())

    @property
    def num_open(self) -> int:
        """Requests admitted and not yet ended."""
        return len(self._open) + len(self._admitting)

    @property
    def num_parked(self) -> int:
        """Streams that are no more and can be resumed."""
        return len(self._parking)

    def find(self, name: str) -> ServedModel:
        """The model of that name; the only one when the name is empty. Raises UnknownModel."""
        if not name and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise UnknownModel(name[:128], tuple(self.models))
        return self.models[name]

    async def open(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        timeout_s: float | None = None,
        caller: Caller = NOBODY,
    ) -> RequestStream:
        """Admits a request, waiting for its turn, or takes up again one that was cut off. Raises InvalidRequest,
        UnknownModel, Overloaded, Unavailable, Quarantined or TimeoutError, with nothing started then."""
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        if timeout_s is not None and timeout_s <= 0:
            raise TimeoutError("the deadline has passed")
        model = self.find(request.model)
        bounds = self.limits, model.backend.limits, model.text.generation
        if isinstance(request, pb.ChatRequest):
            valid = validate_chat(request, *bounds)
        else:
            valid = validate_generate(request, *bounds)
        started_s = _now()
        remaining_s = min(inf if each is None else each for each in (timeout_s, caller.remaining_s))
        permits = self.permits[model.name]
        with self._admit(valid, permits) as request_id:
            goes_on = valid.resume is not None and (request_id in self._open or request_id in self._parking)
            if not goes_on:
                permits.check(caller.name, started_s + remaining_s)
            async with asyncio.timeout_at(deadline_s):
                prompt_ids = await self._prompt_ids(model, valid)
                admitted = settle(valid, request_id, model, prompt_ids)
                journal = Journal(admitted, model.text, model.open_text, started_s)
                if valid.resume is not None:
                    journal.resume(self._arrived(valid.resume, admitted))
                ask = ask_for(journal, caller.name, started_s + remaining_s)
                permit = permits.go_on(ask) if goes_on else await permits.take(ask)
            journal.wait(permit.queued_s)
            run = Run(journal, model.backend, self.recovery)
            try:
                run.start()
            except BaseException:
                permit.give_back()
                raise
            stream = self._open[request_id] = RequestStream(journal, run, deadline_s, permit, self._on_close)
            self._parking.discard(request_id)
            self.recovery.num_resumed += valid.resume is not None
        return stream

    async def stream(
        self, request: pb.GenerateRequest | pb.ChatRequest, timeout_s: float | None = None
    ) -> AsyncIterator[StreamEvent]:
        """Admits and yields every event."""
        with await self.open(request, timeout_s) as stream:
            async for event in stream:
                yield event

    async def complete(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        timeout_s: float | None = None,
        caller: Caller = NOBODY,
    ) -> Completion:
        """Admits and gathers the whole answer. Raises as ``open`` does."""
        if request.diagnostics.trace:
            raise InvalidRequest([FieldViolation("diagnostics.trace", "must be false: only a stream reports digests")])
        if request.HasField("resume"):
            raise InvalidRequest([FieldViolation("resume", "must be absent: only a stream can be resumed")])
        with await self.open(request, timeout_s, caller) as stream:
            stream.is_resumable = False
            return gather([event async for event in stream])

    async def tokenize(self, request: pb.TokenizeRequest) -> list[int]:
        """Raises UnknownModel, InvalidRequest, Overloaded."""
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        text = self.find(request.model).text
        with self._text_call():
            return await self._off_loop(len(request.text), text.encode, request.text, special)

    async def detokenize(self, request: pb.DetokenizeRequest) -> str:
        """Raises UnknownModel, InvalidRequest, Overloaded."""
        model = self.find(request.model)
        ids = list(request.token_ids)
        validate_token_ids("token_ids", ids, model.backend.limits.vocab_size)
        with self._text_call():
            return await self._off_loop(len(ids), model.text.decode, ids, request.skip_special_tokens)

    def close(self) -> None:
        """Ends every open request."""
        for stream in list(self._open.values()):
            stream.close()

    @contextlib.contextmanager
    def _admit(self, valid: ValidRequest, permits: Permits) -> Iterator[str]:
        """Takes a place, given back when admission fails on the way."""
        if self.num_open >= self.limits.max_open_requests:
            raise permits.refuse(Refusal.OPEN, f"{self.num_open} requests are open, the most this gateway takes")
        request_id = valid.request_id or new_request_id()
        earlier = self._admitting.get(request_id)
        if valid.resume is None and (earlier is not None or request_id in self._open):
            raise InvalidRequest([FieldViolation("request_id", "is that of an open request")])
        if earlier is not None:
            earlier.supersede(valid)
        admitting = self._admitting[request_id] = Admitting(valid)
        try:
            with admitting:
                yield request_id
        finally:
            if self._admitting.get(request_id) is admitting:
                del self._admitting[request_id]

    def _arrived(self, claimed: Arrived, admitted: Admitted) -> Arrived:
        """What the caller of a stream has of it. A stream that is still open is taken over. Raises InvalidRequest,
        Quarantined."""
        request_id = admitted.request_id
        if (incident := self.recovery.incidents.of_request(request_id)) is not None:
            raise incident.verdict()
        open_stream = self._open.get(request_id)
        arrived = self._parking.arrived(claimed, admitted, None if open_stream is None else open_stream.journal)
        if open_stream is not None:
            open_stream.supersede()
        return arrived

    def _on_close(self, stream: RequestStream) -> None:
        del self._open[stream.request_id]
        if stream.is_resumable:
            self._parking.park(stream.journal)

    async def _prompt_ids(self, model: ServedModel, valid: ValidRequest) -> tuple[int, ...]:
        if isinstance(valid.prompt, tuple):
            return valid.prompt
        if valid.prompt is not None:
            return tuple(await self._off_loop(len(valid.prompt), model.text.encode, valid.prompt, True))
        if not model.text.has_chat_template:
            raise InvalidRequest([FieldViolation("model", f"{model.name!r} has no chat template")])
        messages = [{"role": role, "content": content} for role, content in valid.messages]
        return tuple(await self._off_loop(sum(len(c) for _, c in valid.messages), _encode_chat, model.text, messages))

    async def _off_loop(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Does small work here and large work in a thread, so that no stream waits for somebody's long text."""
        if size <= self.limits.encode_in_thread_chars:
            return work(*args, **kwargs)
        return await asyncio.to_thread(work, *args, **kwargs)

    @contextlib.contextmanager
    def _text_call(self) -> Iterator[None]:
        """Counts the calls that tokenise and detokenise, which hold large messages while they wait for a thread."""
        if self._num_text_calls >= self.limits.max_text_calls:
            raise Overloaded(f"{self._num_text_calls} texts are being converted, the most this gateway takes")
        self._num_text_calls += 1
        try:
            yield
        finally:
            self._num_text_calls -= 1


def _encode_chat(text: TextModel, messages: list[dict[str, str]]) -> list[int]:
    # The template has written the special tokens itself.
    return text.encode(text.render_chat(messages), add_special_tokens=False)


def _now() -> float:
    return asyncio.get_running_loop().time()
