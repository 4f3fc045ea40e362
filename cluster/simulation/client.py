"""A simulated client: asks once, reads as is its habit, comes back when it is cut off, and holds all that it is told
against the right answer."""

from __future__ import annotations

import asyncio
import random

import grpc

from moestro.cluster.client_calls import Call, error_from, stream
from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.wire import FINISH_TO_PROTO
from moestro.cluster.simulation.checks import Reader
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.scenario import Ask, Habit
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos.errors import InvalidRequest, Overloaded, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import Diagnostics

SLOW_S = 0.3  # between two events
PATIENCE_S = 60.0  # from the last event on it tries for so long
PAUSE_S = 0.2


def call_of(ask: Ask) -> Call[StreamEvent]:
    """The request as the Python client sends it."""
    sampling = ask.sampling
    return stream(
        ask.prompt_ids,
        {
            "request_id": ask.name,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "min_tokens": sampling.min_tokens,
            "ignore_eos": sampling.ignore_eos,
            "stop": ask.stop_strings,
            "stop_token_ids": sampling.stop_token_ids,
            "seed": ask.seed,
            "n": ask.n,
            "priority": ask.priority,
            "diagnostics": Diagnostics(max_chunk=ask.diagnostics.max_chunk, preempt_at=ask.diagnostics.preempt_at),
            **({} if sampling.logprobs is None else {"logprobs": sampling.logprobs}),
            **({} if sampling.prompt_logprobs is None else {"prompt_logprobs": sampling.prompt_logprobs}),
        },
    )


class SimulatedClient:
    """One request in a process of its own."""

    def __init__(
        self, ask: Ask, process: Process, sockets: Sockets, gateways: list[str], rng: random.Random, trace: Trace
    ) -> None:
        self.reader = Reader(ask)
        self.process = process
        self._call = call_of(ask)
        self._sockets, self._gateways, self._rng, self._trace = sockets, gateways, rng, trace
        self._until_s = 0.0
        self._trusts = rng.random() < 0.3  # that the gateway remembers what it has sent

    async def run(self) -> None:
        """Until its answer is there, or an error for good, or it has left."""
        ask, reader, time = self.reader.ask, self.reader, asyncio.get_running_loop().time
        await asyncio.sleep(ask.at_s)
        self._trace(ask.name, "asks {}", ask.habit.value)
        self._until_s = time() + PATIENCE_S
        is_again = False
        while not (reader.is_finished or reader.has_left):
            try:
                await self._read(self._request(is_again))
            except grpc.aio.AioRpcError as failure:
                error = error_from(failure)
                self._trace(ask.name, "hears {}", error)
                if isinstance(error, InvalidRequest) and self._trusts:
                    self._trusts = False  # this gateway does not remember: it must be told
                    continue
                if not isinstance(error, Unavailable | Overloaded) or time() > self._until_s:
                    reader.error = error
                    break
                # A gateway that could not be asked has not heard of the request, any other may have.
                is_again = is_again or failure.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
                await asyncio.sleep(max(PAUSE_S, error.retry_after_s))
        self._trace(ask.name, "ends: {}", reader.error or ("finished" if reader.is_finished else "left"))

    async def _read(self, data: bytes) -> None:
        """One stream to its end, which may not be that of the answer."""
        ask, reader = self.reader.ask, self.reader
        channel = self._sockets.channel(self._rng.choice(self._gateways))
        responses = channel.unary_stream(self._call.path)(data, timeout=None)
        try:
            async for message in responses:
                event = self._call.decode(message)
                self._trace(ask.name, "event {} {}", event.sequence_number, [d.token_ids for d in event.deltas])
                reader.take(event)
                self._until_s = asyncio.get_running_loop().time() + PATIENCE_S
                if reader.num_events > ask.habit_at:
                    if ask.habit is Habit.CANCELS:
                        reader.has_left = True
                        return
                    if ask.habit is Habit.VANISHES:
                        self.process.kill()
                    if ask.habit is Habit.COMES_BACK and not reader.was_cut:
                        reader.was_cut = True
                        channel.cut()
                if ask.habit is Habit.SLOW:
                    await asyncio.sleep(SLOW_S)
        finally:
            responses.cancel()

    def _request(self, is_again: bool) -> bytes:
        """The request; with what has arrived, when it was asked before."""
        if not is_again:
            return self._call.data
        request = pb.GenerateRequest.FromString(self._call.data)
        reader = self.reader
        request.resume.SetInParent()
        if reader.num_events:
            request.resume.last_sequence_number = reader.num_events - 1
        if not self._trusts:
            for index, token_ids in enumerate(reader.token_ids):
                if token_ids or reader.reasons[index]:
                    reason = FINISH_TO_PROTO[reader.reasons[index]]
                    request.resume.choices.add(index=index, token_ids=token_ids, finish_reason=reason)
        return request.SerializeToString()
