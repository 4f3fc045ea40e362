"""A simulated client: asks once, reads as is its habit, and holds all that it is told against the right answer. Most
are the real Python client; some are written by hand from the .proto, and trust gateways to remember."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import grpc

from moestro.cluster.client_async import AsyncClient
from moestro.cluster.client_attempts import error_from
from moestro.cluster.client_calls import Options, stream
from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.simulation.checks import Reader
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.scenario import Ask, Habit
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos.errors import InvalidRequest, MoestroError, Overloaded, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import Diagnostics

SLOW_S = 0.3  # between two events
PATIENCE_S = 120.0  # until it gives up a request that nobody takes
PAUSE_S = 0.5


def options_of(ask: Ask) -> Options:
    """As the Python client takes them."""
    sampling = ask.sampling
    options = Options(
        request_id=ask.name,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop=ask.stop_strings,
        stop_token_ids=sampling.stop_token_ids,
        seed=ask.seed,
        n=ask.n,
        priority=ask.priority,
        diagnostics=Diagnostics(max_chunk=ask.diagnostics.max_chunk, preempt_at=ask.diagnostics.preempt_at),
    )
    if sampling.logprobs is not None:
        options["logprobs"] = sampling.logprobs
    if sampling.prompt_logprobs is not None:
        options["prompt_logprobs"] = sampling.prompt_logprobs
    return options


class SimulatedClient:
    """One request in a process of its own."""

    def __init__(
        self, ask: Ask, process: Process, sockets: Sockets, gateways: list[str], rng: random.Random, trace: Trace
    ) -> None:
        self.reader = Reader(ask)
        self.process = process
        self._sockets, self._gateways, self._rng, self._trace = sockets, gateways, rng, trace

    async def run(self) -> None:
        """Until its answer is there, or an error for good, or it has left."""
        ask, reader, time = self.reader.ask, self.reader, asyncio.get_running_loop().time
        await asyncio.sleep(ask.at_s)
        self._trace(ask.name, "asks: {}", ask.habit.value)
        until_s = time() + PATIENCE_S
        ask_once = self._by_hand if ask.is_by_hand else self._by_library
        while not (reader.is_finished or reader.has_left):
            try:
                await self._read(ask_once())
            except (MoestroError, TimeoutError) as error:
                self._trace(ask.name, "hears {}", error)
                # Nothing has begun: a library leaves it to its user how long to knock at a door that is shut.
                if not isinstance(error, Unavailable | Overloaded) or reader.num_events or time() > until_s:
                    reader.error = error
                    break
                await asyncio.sleep(PAUSE_S)
        self._trace(ask.name, "ends: {}", reader.error or ("finished" if reader.is_finished else "left"))

    async def _read(self, events: AsyncIterator[StreamEvent]) -> None:
        ask, reader = self.reader.ask, self.reader
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                self._trace(ask.name, "event {} {}", event.sequence_number, [d.token_ids for d in event.deltas])
                reader.take(event)
                if reader.num_events > ask.habit_at:
                    if ask.habit is Habit.CANCELS:
                        reader.has_left = True
                        return
                    if ask.habit is Habit.VANISHES:
                        self.process.kill()
                    if ask.habit is Habit.COMES_BACK and not reader.was_cut:
                        reader.was_cut = True
                        self._sockets.cut(self.process)
                if ask.habit is Habit.SLOW:
                    await asyncio.sleep(SLOW_S)

    async def _by_library(self) -> AsyncIterator[StreamEvent]:
        gateways = self._rng.sample(self._gateways, len(self._gateways))
        async with AsyncClient(gateways, open_channel=self._sockets.channel) as client:
            ask = self.reader.ask
            async for event in client.stream(ask.prompt_ids, **options_of(ask)):
                yield event

    async def _by_hand(self) -> AsyncIterator[StreamEvent]:
        """Sends the number of the last event alone, and the tokens only to a gateway that asks for them."""
        call = stream(self.reader.ask.prompt_ids, options_of(self.reader.ask))
        request = pb.GenerateRequest.FromString(call.request.SerializeToString())
        until_s = asyncio.get_running_loop().time() + PATIENCE_S
        while not self.reader.is_finished:
            channel = self._sockets.channel(self._rng.choice(self._gateways))
            responses = channel.unary_stream(call.path)(request.SerializeToString())
            try:
                async for data in responses:
                    yield call.decode(data)
            except grpc.aio.AioRpcError as failure:
                error = error_from(failure)
                knows = not isinstance(error, InvalidRequest) or bool(request.resume.choices)
                if knows and (not isinstance(error, Unavailable | Overloaded) or until_s < _now()):
                    raise error from None
                await asyncio.sleep(PAUSE_S)
                self._resume(request, with_tokens=isinstance(error, InvalidRequest))
            finally:
                responses.cancel()

    def _resume(self, request: pb.GenerateRequest, with_tokens: bool) -> None:
        reader = self.reader
        request.resume.Clear()
        request.resume.SetInParent()
        if reader.num_events:
            request.resume.last_sequence_number = reader.num_events - 1
        if with_tokens:
            request.resume.choices.extend(reader.arrived())


def _now() -> float:
    return asyncio.get_running_loop().time()
