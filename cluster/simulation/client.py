"""A simulated client: asks once, reads as is its habit, and holds what it is told against the right answer."""

from __future__ import annotations

import asyncio
import random

from moestro.cluster.client_calls import Call, error_from, stream
from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.simulation.checks import Reader
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.scenario import Ask, Habit
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.protos.sequences import Diagnostics

SLOW_S = 0.3  # between two events


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
        self._sockets, self._gateways, self._rng, self._trace = sockets, gateways, rng, trace

    async def run(self) -> None:
        """Until its answer is there, or an error, or it has left."""
        ask, reader = self.reader.ask, self.reader
        await asyncio.sleep(ask.at_s)
        self._trace(ask.name, "asks {}", ask.habit.value)
        call = call_of(ask)
        channel = self._sockets.channel(self._rng.choice(self._gateways))
        responses = channel.unary_stream(call.path)(call.data, timeout=None)
        try:
            async for data in responses:
                event = call.decode(data)
                reader.take(event)
                self._trace(ask.name, "event {} {}", event.sequence_number, [d.token_ids for d in event.deltas])
                if reader.num_events > ask.habit_at:
                    if ask.habit is Habit.CANCELS:
                        break
                    if ask.habit is Habit.VANISHES:
                        self.process.kill()
                if ask.habit is Habit.SLOW:
                    await asyncio.sleep(SLOW_S)
        except Exception as failure:
            if isinstance(failure, AssertionError):
                raise
            reader.error = error_from(failure)  # type: ignore[arg-type]
        finally:
            responses.cancel()
            self._trace(ask.name, "ends: {}", reader.error or ("finished" if reader.is_finished else "left"))
