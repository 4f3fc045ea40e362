"""A Backend without a model: deterministic tokens, at once or at a given rate; and a cluster without ranks. To test and
measure the edge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from moestro.cluster.backend import Capacity
from moestro.protos.errors import EngineLost, Overloaded, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import (
    EngineLimits,
    FinishReason,
    SequenceDelta,
    SequenceLedger,
    SequenceRequest,
    TokenLogprobs,
)


def stub_token(sequence: SequenceRequest, position: int, vocab_size: int) -> int:
    """The token at an output position: a function of prompt, seed and position alone, so that a replay agrees."""
    last = sequence.prompt_ids[-1] if sequence.prompt_ids else 0
    return (last + sequence.sampling.seed % 1009 + 7 * position + 1) % vocab_size


class Fault(NamedTuple):
    """What happens to one stream of a stub: its start is refused, or after some steps its engine is lost."""

    after_steps: int
    died: bool = True
    refuses: bool = False


class StubBackend:
    """One token per sequence and step. ``step_s`` is the time between steps; 0 lets every stream run as fast as it is
    read. ``fail_at`` ends every sequence with an error at that position; ``lose()`` breaks every stream for good.

    ``faults`` are drawn from, one for each stream, as long as there are any: after so many steps its engine is lost.
    ``poison`` says of a sequence and a position that computing it kills the engine with every stream there. The engine
    is back at once."""

    def __init__(
        self,
        limits: EngineLimits,
        step_s: float = 0.0,
        fail_at: int | None = None,
        *,
        faults: Iterable[Fault] = (),
        poison: Callable[[SequenceRequest, int], bool] | None = None,
    ) -> None:
        self._limits = limits
        self._step_s = step_s
        self._faults = iter(faults)
        self.fail_at = fail_at
        self.poison = poison
        self.lost = False
        self.num_deaths = 0
        self.streams: dict[StubStream, None] = {}
        self.cancelled: list[str] = []
        self.num_started = 0  # sequences, ever

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def capacity(self) -> Capacity:
        return Capacity(self._limits.max_running, self._limits.max_tokens)

    @property
    def open_sequences(self) -> set[str]:
        """Sequences neither ended nor cancelled."""
        return {sequence_id for stream in self.streams for sequence_id in stream.positions}

    def start(self, sequences: Sequence[SequenceRequest]) -> StubStream:
        if self.lost:
            raise Unavailable("the stub is lost")
        if len(self.open_sequences) + len(sequences) > self._limits.max_waiting:
            raise Overloaded(f"{self._limits.max_waiting} sequences are open, the most this stub takes")
        if clash := self.open_sequences & {s.sequence_id for s in sequences}:
            raise AssertionError(f"sequence ids are open already: {sorted(clash)}")
        fault = next(self._faults, None)
        if fault is not None and fault.refuses:
            raise Overloaded("the stub's waiting line is full", retry_after_s=0.01)
        stream = StubStream(self, sequences, fault)
        self.streams[stream] = None
        self.num_started += len(sequences)
        return stream

    def lose(self) -> None:
        """From now on every stream raises Unavailable."""
        self.lost = True

    def kill(self) -> None:
        """The engine dies with every stream it has, and another takes its place."""
        self.num_deaths += 1
        for stream in list(self.streams):
            stream.kill(EngineLost("the stub was killed", died=True, engine=f"stub {self.num_deaths}"))

    async def available(self) -> None:
        if self.lost:
            raise Unavailable("the stub is lost")

    async def outlived(self, engine: str) -> bool:
        return False

    async def wait_for_step(self) -> None:
        await asyncio.sleep(self._step_s)


class StubStream:
    """The deltas of one request."""

    def __init__(self, backend: StubBackend, sequences: Sequence[SequenceRequest], fault: Fault | None = None) -> None:
        self._backend = backend
        self._fault = fault
        self._steps = 0
        self._loss: EngineLost | None = None
        self._sequences = {s.sequence_id: s for s in sequences}
        self.positions = {s.sequence_id: len(s.output_ids) for s in sequences}
        self._num_started = dict(self.positions)

    async def next(self) -> list[SequenceDelta]:
        assert self.positions or self._loss, "next() after every sequence has ended"
        await self._backend.wait_for_step()
        if self._backend.lost:
            self.close()
            raise Unavailable("the stub is lost")
        if self._fault is not None or self._backend.poison is not None:
            self._suffer()
        if self._loss is not None:
            raise self._loss
        if not self.positions:
            raise Unavailable("the stream was closed")
        return [self._step(sequence_id, position) for sequence_id, position in list(self.positions.items())]

    def _suffer(self) -> None:
        poison = self._backend.poison
        if poison is not None and any(poison(self._sequences[name], at) for name, at in self.positions.items()):
            self._backend.kill()
        if self._fault is not None and self._steps == self._fault.after_steps:
            self.kill(EngineLost("the stub was told so", died=self._fault.died, engine="stub"))
        self._steps += 1

    def kill(self, loss: EngineLost) -> None:
        """What runs here is gone; no cancel of it is seen."""
        self.positions.clear()
        self._loss = loss
        self._close_if_empty()

    def cancel(self, sequence_id: str) -> None:
        if self.positions.pop(sequence_id, None) is not None:
            self._backend.cancelled.append(sequence_id)
            self._close_if_empty()

    def close(self) -> None:
        for sequence_id in list(self.positions):
            self.cancel(sequence_id)
        self._close_if_empty()

    def num_unread(self) -> int:
        return 0  # a token is made when it is asked for

    def _close_if_empty(self) -> None:
        if not self.positions:
            self._backend.streams.pop(self, None)

    def _step(self, sequence_id: str, position: int) -> SequenceDelta:
        sequence = self._sequences[sequence_id]
        params = sequence.sampling
        if position == self._backend.fail_at:
            self._end(sequence_id)
            return SequenceDelta(sequence_id, finish_reason=FinishReason.ERROR, error="made to fail")
        token = stub_token(sequence, position, self._backend.limits.vocab_size)
        reason = _reason(sequence, token, position + 1)
        self.positions[sequence_id] = position + 1
        if reason is None and params.logprobs is None and params.prompt_logprobs is None:
            return SequenceDelta(sequence_id, (token,))
        if reason is not None:
            self._end(sequence_id)
        first = position == self._num_started[sequence_id]
        return SequenceDelta(
            sequence_id,
            (token,),
            logprobs=() if params.logprobs is None else (stub_logprobs(token, params.logprobs),),
            prompt_logprobs=_prompt_logprobs(sequence) if first else None,
            finish_reason=reason,
            ledger=SequenceLedger(num_steps=position + 1) if reason else None,
        )

    def _end(self, sequence_id: str) -> None:
        del self.positions[sequence_id]
        self._close_if_empty()


def stub_logprobs(token: int, count: int) -> TokenLogprobs:
    """Not of any model, but recognisable: -1 for the token, -1, -2, ... for the ids from 0."""
    return TokenLogprobs(token, -1.0, tuple((i, -1.0 - i) for i in range(count)))


def _prompt_logprobs(sequence: SequenceRequest) -> tuple[TokenLogprobs | None, ...] | None:
    count = sequence.sampling.prompt_logprobs
    if count is None:
        return None
    return (None, *(stub_logprobs(token, count) for token in sequence.prompt_ids[1:]))


def _reason(sequence: SequenceRequest, token: int, num_output: int) -> FinishReason | None:
    params = sequence.sampling
    if num_output > params.min_tokens:
        if token in params.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if token in params.eos_token_ids and not params.ignore_eos:
            return FinishReason.EOS
    return FinishReason.LENGTH if num_output >= params.max_tokens else None


class StubCluster:
    """A ClusterSource of given groups, which keeps what it is asked to place."""

    def __init__(self, groups: Sequence[pb.GroupExperts] = (pb.GroupExperts(group="g0"),)) -> None:
        self._groups = tuple(groups)
        self.placements: list[pb.SetPlacementRequest] = []

    async def status(self) -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse(groups=[pb.Group(name=each.group, dp=1, tp=1) for each in self._groups])

    async def experts(self, request: pb.GetExpertsRequest) -> pb.GetExpertsResponse:
        return pb.GetExpertsResponse(groups=self._groups)

    async def set_placement(self, request: pb.SetPlacementRequest) -> pb.SetPlacementResponse:
        self.placements.append(request)
        return pb.SetPlacementResponse(groups=[each.group for each in self._groups])
