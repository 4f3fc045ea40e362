"""The request core: validate, admit, tokenise, start, stream. Knows no transport.

gRPC and HTTP servers and in-process callers give it the public messages and get typed events; what goes wrong is an
exception of ``protos.errors``, or TimeoutError when the caller's deadline passes. However a stream ends, nothing of it
keeps running in the backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import TracebackType
from typing import ParamSpec, TypeVar

from moestro.cluster.backend import DeltaStream
from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.journal import Admitted, Journal
from moestro.cluster.edge.permits import Permit, Permits
from moestro.cluster.edge.served import EdgeLimits, ServedModel, TextModel
from moestro.cluster.edge.tickets import Ask, Refusal
from moestro.cluster.edge.validation import ValidRequest, fit, validate_chat, validate_generate, validate_token_ids
from moestro.protos.errors import FieldViolation, InvalidRequest, Overloaded, UnknownModel
from moestro.protos.gen import inference_pb2 as pb
from moestro.workers.sampling.seeds import derive_seed

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``name`` is what admission is fair to; ``remaining_s``: until the caller gives up, by its own clock."""

    name: str = ""
    remaining_s: float | None = None


class RequestStream:
    """One open request. An async iterator of its events, and a context manager that closes it."""

    def __init__(
        self, core: RequestCore, journal: Journal, deltas: DeltaStream, deadline_s: float | None, permit: Permit
    ) -> None:
        self.journal = journal
        self._permit = permit
        self._core = core
        self._deltas = deltas
        self._deadline_s = deadline_s
        self._closed = False

    @property
    def request_id(self) -> str:
        return self.journal.admitted.request_id

    async def next(self) -> StreamEvent | None:
        """The next event, None after the last. Raises SequenceFailed, Unavailable, TimeoutError; closed then."""
        try:
            while not self.journal.finished and not self._closed:
                if self._deadline_s is None:
                    deltas = await self._deltas.next()
                else:
                    async with asyncio.timeout_at(self._deadline_s):
                        deltas = await self._deltas.next()
                event, cancel = self.journal.accept(deltas, time.monotonic())
                for sequence_id in cancel:
                    self._deltas.cancel(sequence_id)
                if event is not None:
                    if event.usage is not None:
                        self.close()
                    return event
        except BaseException:
            self.close()
            raise
        return None

    def close(self) -> None:
        """Cancels what still runs and gives the place back. Idempotent."""
        if not self._closed:
            self._closed = True
            self._core.forget(self)
            self._deltas.close()
            self._permit.give_back(
                first_s=self.journal.first_token_s, written=self.journal.num_written, finished=self.journal.finished
            )

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __enter__(self) -> RequestStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RequestCore:
    """Serves the requests of one edge process, on one event loop."""

    def __init__(self, models: Sequence[ServedModel], limits: EdgeLimits | None = None) -> None:
        if not models:
            raise ValueError("an edge without a model")
        self.limits = limits or EdgeLimits()
        self.models = {model.name: model for model in models}
        self._open: dict[str, RequestStream | None] = {}  # by request id; None while it is being admitted
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
        return len(self._open)

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
        caller: Caller = Caller(),
    ) -> RequestStream:
        """Admits a request, waiting for its turn. Raises InvalidRequest, UnknownModel, Overloaded, Unavailable or
        TimeoutError, with nothing started then."""
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        if timeout_s is not None and timeout_s <= 0:
            raise TimeoutError("the deadline has passed")
        model = self.find(request.model)
        bounds = self.limits, model.backend.limits, model.text.generation
        if isinstance(request, pb.ChatRequest):
            valid = validate_chat(request, *bounds)
        else:
            valid = validate_generate(request, *bounds)
        started_s = time.monotonic()
        remaining_s = min(inf if each is None else each for each in (timeout_s, caller.remaining_s))
        permits = self.permits[model.name]
        with self._admit(valid, permits) as request_id:
            permits.check(caller.name, started_s + remaining_s)
            async with asyncio.timeout_at(deadline_s):
                prompt_ids = await self._prompt_ids(model, valid)
                admitted = _settle(valid, request_id, model, prompt_ids)
                journal = Journal(admitted, model.text, model.open_text, started_s)
                permit = await permits.take(_ask(journal, caller.name, started_s + remaining_s))
            journal.queued_s = permit.queued_s
            try:
                stream = RequestStream(self, journal, model.backend.start(journal.sequences()), deadline_s, permit)
            except BaseException:
                permit.give_back()
                raise
            self._open[request_id] = stream
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
        caller: Caller = Caller(),
    ) -> Completion:
        """Admits and gathers the whole answer. Raises as ``open`` does."""
        if request.diagnostics.trace:
            raise InvalidRequest([FieldViolation("diagnostics.trace", "must be false: only a stream reports digests")])
        with await self.open(request, timeout_s, caller) as stream:
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

    def forget(self, stream: RequestStream) -> None:
        """A stream has ended; called by the stream itself."""
        self._open.pop(stream.request_id, None)

    def close(self) -> None:
        """Ends every open request."""
        for stream in list(self._open.values()):
            if stream is not None:
                stream.close()

    @contextlib.contextmanager
    def _admit(self, valid: ValidRequest, permits: Permits) -> Iterator[str]:
        """Takes a place, given back when admission fails on the way."""
        if len(self._open) >= self.limits.max_open_requests:
            raise permits.refuse(Refusal.OPEN, f"{len(self._open)} requests are open, the most this gateway takes")
        request_id = valid.request_id or new_request_id()
        if request_id in self._open:
            raise InvalidRequest([FieldViolation("request_id", "is that of an open request")])
        self._open[request_id] = None
        try:
            yield request_id
        except BaseException:
            self._open.pop(request_id, None)
            raise

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


def new_request_id() -> str:
    """An id for a request whose caller gave none."""
    return f"req-{secrets.token_hex(8)}"


def _ask(journal: Journal, client: str, deadline_s: float) -> Ask:
    """What a request costs from here: of one that is gone on with, what was written before belongs to the prompt."""
    sequences = journal.sequences()
    written = max(len(sequence.output_ids) for sequence in sequences)
    return Ask(
        client=client,
        prompt_tokens=len(journal.admitted.prompt_ids) + written,
        max_tokens=max(1, max(sequence.sampling.max_tokens for sequence in sequences) - written),
        choices=len(sequences),
        priority=journal.admitted.priority,
        deadline_s=deadline_s,
    )


def _settle(valid: ValidRequest, request_id: str, model: ServedModel, prompt_ids: tuple[int, ...]) -> Admitted:
    """Fits the request into the context and expands it into its choices."""
    given_as = "text" if isinstance(valid.prompt, str) else "token_ids.ids"
    field = "messages" if valid.prompt is None else given_as
    sampling = fit(valid, len(prompt_ids), model.backend.limits, field)
    seed = secrets.randbits(64) if valid.seed is None else valid.seed
    return Admitted(
        request_id=request_id,
        model=model.name,
        prompt_ids=prompt_ids,
        sampling=tuple(
            # The prompt is the same for every choice, so its logprobs are asked for once.
            replace(sampling, seed=derive_seed(seed, i), prompt_logprobs=sampling.prompt_logprobs if i == 0 else None)
            for i in range(valid.n)
        ),
        seed=seed,
        stop_strings=valid.stop_strings,
        priority=valid.priority,
        diagnostics=valid.diagnostics,
    )
