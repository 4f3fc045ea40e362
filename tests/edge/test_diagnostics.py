"""The diagnostics of a request on their way down, digests on their way up, and the choice of a named rank."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest
from tests.cluster.test_rank_link import Rank, serving, until
from tests.edge.fakes import LIMITS
from tests.edge.serving import refused, rig, run

from moestro.cluster.backend import unknown_rank
from moestro.cluster.client import AsyncClient
from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.edge.events import StreamEvent, gather
from moestro.cluster.edge.stub import StubBackend, StubStream
from moestro.cluster.ranks.backend import ClusterBackend, places
from moestro.protos.errors import InvalidRequest, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import Diagnostics, PositionTrace, SamplingParams, SequenceDelta, SequenceRequest

ASKED = Diagnostics(rank="group-0", max_chunk=7, preempt_at=0, trace=True)
TOP = 2**64 - 1


class Tracing(StubBackend):
    """Keeps what it was sent, and reports a digest made of the position, first for a chunk without a token."""

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self.sequences: list[SequenceRequest] = []

    def start(self, sequences: Sequence[SequenceRequest]) -> StubStream:
        self.sequences += sequences
        return TracingStream(self, sequences)


class TracingStream(StubStream):
    def __init__(self, backend: StubBackend, sequences: Sequence[SequenceRequest]) -> None:
        super().__init__(backend, sequences)
        backend.streams[self] = None
        self._chunk: list[SequenceDelta] = [
            SequenceDelta(s.sequence_id, trace=(PositionTrace(0, (TOP, 0)),)) for s in sequences if s.diagnostics.trace
        ]

    async def next(self) -> list[SequenceDelta]:
        chunk, self._chunk = self._chunk, []
        return chunk or await super().next()

    def _step(self, sequence_id: str, position: int) -> SequenceDelta:
        delta = super()._step(sequence_id, position)
        trace = (PositionTrace(position + 1, (position, 2**63 + position)),)
        return SequenceDelta(
            delta.sequence_id,
            delta.token_ids,
            finish_reason=delta.finish_reason,
            ledger=delta.ledger,
            trace=trace if self._sequences[sequence_id].diagnostics.trace else (),
        )


def test_every_choice_is_asked_alike_and_no_digest_is_lost() -> None:
    async def scenario() -> None:
        backend = Tracing()
        async with rig(backend) as it, AsyncClient(f"127.0.0.1:{it.port}") as client:
            asked = client.stream("abc", max_tokens=3, n=2, seed=1, diagnostics=ASKED)
            events: list[StreamEvent] = [event async for event in asked]
            chat = [e async for e in client.stream_chat("hi", max_tokens=1, diagnostics=ASKED)]
            plain = [e async for e in client.stream("abc", max_tokens=3, seed=1)]
        assert [sequence.diagnostics for sequence in backend.sequences] == [ASKED] * 3 + [Diagnostics()]
        expected = (PositionTrace(0, (TOP, 0)), *(PositionTrace(i + 1, (i, 2**63 + i)) for i in range(3)))
        assert [choice.trace for choice in gather(events).choices] == [expected, expected]
        assert gather(chat).choices[0].trace == expected[:2]
        assert gather(plain).choices[0].trace == ()
        assert gather(plain).choices[0].token_ids == gather(events).choices[0].token_ids
        assert [event.sequence_number for event in events] == list(range(len(events)))

    run(scenario())


def test_a_whole_answer_has_no_place_for_digests_and_says_so() -> None:
    async def scenario() -> None:
        async with rig() as it:
            asked = pb.GenerateRequest(text="abc", diagnostics=pb.Diagnostics(trace=True))
            said = await refused(it.stub.Complete(pb.CompleteRequest(request=asked)))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert "only a stream" in said.fields["request.diagnostics.trace"]

    run(scenario())


def test_a_number_that_its_field_cannot_hold_is_refused_by_the_client() -> None:
    async def scenario() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(InvalidRequest, match="diagnostics"):
                await client.generate("abc", diagnostics=Diagnostics(max_chunk=-1))

    run(scenario())


def group(name: str, addresses: Sequence[str], tp: int = 1) -> GroupEntry:
    ranks = tuple(RankEntry(i // tp, i % tp, RankState.SERVING, address) for i, address in enumerate(addresses))
    return GroupEntry(name, len(addresses) // tp, tp, 2, ranks)


def test_the_names_of_ranks_and_groups() -> None:
    found = places([group("group-0", ["a", "", "b", ""], tp=2), group("group-1", ["c"])])
    assert found == {
        "group-0": ("a", "b"),
        "group-0 rank 0": ("a",),
        "group-0 rank 1": ("a",),
        "group-0 rank 2": ("b",),
        "group-0 rank 3": ("b",),
        "group-1": ("c",),
        "group-1 rank 0": ("c",),
    }


def sequence(rank: str) -> SequenceRequest:
    return SequenceRequest("x", (1,), SamplingParams(), diagnostics=Diagnostics(rank=rank, max_chunk=3))


def test_a_named_rank_or_group_serves_the_request() -> None:
    async def scenario() -> None:
        async with serving() as (one, a, _), serving() as (two, b, _), serving() as (three, c, _):
            backend = ClusterBackend("gw", "s3cret")
            backend.update([group("g", [a, b]), group("h", [c])])
            ranks: list[Rank] = [one, two, three]
            await until(lambda: len(backend.loads()) == 3)
            for _ in range(4):
                backend.start([sequence("g rank 1")])
                backend.start([sequence("h")])
            await until(lambda: sum(len(rank.requests) for rank in ranks) == 8)
            assert [len(rank.requests) for rank in ranks] == [0, 4, 4]
            for _ in range(4):
                backend.start([sequence("g")])
            await until(lambda: sum(len(rank.requests) for rank in ranks) == 12)
            assert [len(rank.requests) for rank in ranks] == [4, 4, 4]  # the least loaded of the group
            assert {request.diagnostics for rank in ranks for request in rank.requests} == {Diagnostics(max_chunk=3)}
            with pytest.raises(InvalidRequest, match=r"diagnostics.rank: must be one of 'g', 'g rank 0', .* is 'i'"):
                backend.start([sequence("i")])
            backend.update([group("g", [a, b]), group("h", [""])])
            with pytest.raises(Unavailable, match="no rank of 'h' is serving now"):
                backend.start([sequence("h")])
            await backend.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_refusal_names_a_few_of_many_and_cuts_what_was_said() -> None:
    violation = unknown_rank("x" * 9999, [f"g rank {i}" for i in range(100)]).violations[0]
    assert violation.field == "diagnostics.rank"
    assert "'g rank 7' and 92 more" in violation.description
    assert len(violation.description) < 300
