"""A gateway's link and a rank's server over a real socket; the engine behind is a few lines of this test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.ranks.backend import ClusterBackend
from moestro.cluster.ranks.link import RankLink
from moestro.cluster.ranks.server import CHANNEL_OPTIONS, RankServer
from moestro.protos import wire
from moestro.protos.errors import EngineLost, Overloaded, Unavailable
from moestro.protos.experts import ExpertsReport
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.gen import rank_pb2_grpc
from moestro.protos.sequences import (
    EngineLimits,
    EngineLoad,
    FinishReason,
    SamplingParams,
    SequenceDelta,
    SequenceRequest,
)

LIMITS = EngineLimits(vocab_size=100, max_context=64, max_waiting=4)


class Rank:
    """Keeps what it was sent; the test decides what it answers."""

    def __init__(self) -> None:
        self.server = RankServer(
            self.take,
            LIMITS,
            EngineLoad(kv_blocks_total=9),
            secret="s3cret",
            epoch=2,
            experts=lambda: ExpertsReport("Stub", 0, 0, 0.0, (), ()),
            request_placement=lambda request: None,
        )
        self.requests: list[SequenceRequest] = []
        self.cancelled: list[str] = []

    def take(self, data: bytes) -> None:
        message = pb.AttachRequest.FromString(data)
        if message.WhichOneof("message") == "submit":
            self.requests.append(wire.decode_request(message.submit))
        else:
            self.cancelled.append(message.cancel)

    def answer(self, *deltas: SequenceDelta) -> None:
        self.server.publish(deltas, (), EngineLoad(num_running=len(self.requests)))


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Rank, str, grpc.aio.Server]]:
    rank = Rank()
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    rank_pb2_grpc.add_RankServiceServicer_to_server(rank.server, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield rank, f"127.0.0.1:{port}", server
    finally:
        await server.stop(0)


@asynccontextmanager
async def attached(address: str, lost: list[RankLink] | None = None) -> AsyncIterator[RankLink]:
    link = RankLink(address, "gw", "s3cret", 2, (lost if lost is not None else []).append)
    await link.connect()
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def following(address: str) -> AsyncIterator[tuple[ClusterBackend, RankEntry]]:
    """A backend that knows of one rank, in epoch 2 of group g, reached or not; and that rank's entry."""
    backend, entry = ClusterBackend("gw", "s3cret"), RankEntry(0, 0, RankState.SERVING, address)
    backend.update([GroupEntry("g", 1, 1, 2, (entry,))])
    try:
        yield backend, entry
    finally:
        await backend.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing here signals
            await asyncio.sleep(0.005)


def request(name: str) -> SequenceRequest:
    return SequenceRequest(name, (1, 2, 3), SamplingParams(max_tokens=4))


def test_deltas_reach_the_stream_that_asked() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as link:
            assert link.limits == LIMITS
            await until(lambda: link.load.kv_blocks_total == 9)  # known before the first step
            one, two = link.start([request("one")]), link.start([request("two/0"), request("two/1")])
            await until(lambda: len(rank.requests) == 3)
            ids = [r.sequence_id for r in rank.requests]
            rank.answer(*(SequenceDelta(i, (n,)) for n, i in enumerate(ids)))
            assert await one.next() == [SequenceDelta("one", (0,))]
            assert await two.next() == [SequenceDelta("two/0", (1,)), SequenceDelta("two/1", (2,))]
            rank.answer(*(SequenceDelta(i, (9,), finish_reason=FinishReason.LENGTH) for i in ids))
            assert [d.token_ids for d in await one.next()] == [(9,)]
            await until(lambda: link.num_open == 0)
            assert link.load.num_running == 3

    asyncio.run(scenario())


def test_a_name_may_be_used_again_while_its_last_word_is_under_way() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as link:
            link.start([request("same")]).close()
            again = link.start([request("same")])
            await until(lambda: len(rank.requests) == 2 and len(rank.cancelled) == 1)
            old, new = (r.sequence_id for r in rank.requests)
            assert rank.cancelled == [old]
            rank.answer(SequenceDelta(old, finish_reason=FinishReason.CANCELLED), SequenceDelta(new, (5,)))
            assert await again.next() == [SequenceDelta("same", (5,))]

    asyncio.run(scenario())


def test_a_refusal_is_overloaded() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as link:
            stream = link.start([request("one")])
            await until(lambda: bool(rank.requests))
            rank.server.publish((), [(rank.requests[0].sequence_id, "4 sequences wait")], EngineLoad())
            with pytest.raises(Overloaded, match="4 sequences wait"):
                await stream.next()
            assert link.num_open == 0

    asyncio.run(scenario())


def test_a_gateway_that_leaves_takes_its_sequences_with_it() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _):
            async with attached(address) as link:
                link.start([request("one"), request("two")])
                await until(lambda: len(rank.requests) == 2)
            await until(lambda: len(rank.cancelled) == 2)
            assert sorted(rank.cancelled) == sorted(r.sequence_id for r in rank.requests)

    asyncio.run(scenario())


@pytest.mark.parametrize("attaches", [True, False])
def test_nothing_of_a_link_to_a_lost_rank_is_left(attaches: bool) -> None:
    """Found by the chaos harness: a task and a channel for each rank that was lost, or that refused the gateway."""

    async def scenario() -> None:
        before = asyncio.all_tasks()
        lost: list[RankLink] = []
        async with serving() as (_, address, server):
            link = RankLink(address, "gw", "s3cret" if attaches else "wrong", 2, lost.append)
            if attaches:
                await link.connect()
                await server.stop(0)
                await until(lambda: lost == [link])
            else:
                with pytest.raises(Unavailable):
                    await link.connect()
                await link.close()
        await until(lambda: asyncio.all_tasks() == before)

    asyncio.run(scenario())


def test_a_lost_rank_fails_its_streams_and_says_so_once() -> None:
    async def scenario() -> None:
        lost: list[RankLink] = []
        async with serving() as (rank, address, server), attached(address, lost) as link:
            stream = link.start([request("one")])
            await until(lambda: bool(rank.requests))
            rank.answer(SequenceDelta(rank.requests[0].sequence_id, (7,)))
            assert await stream.next() == [SequenceDelta("one", (7,))]
            await server.stop(0)
            with pytest.raises(Unavailable, match="a rank was lost"):
                await stream.next()
            assert lost == [link]

    asyncio.run(scenario())


def test_a_dead_engine_tells_every_gateway_now_and_later() -> None:
    async def scenario() -> None:
        lost: list[RankLink] = []
        async with serving() as (rank, address, _), attached(address, lost) as link:
            stream = link.start([request("one")])
            await until(lambda: bool(rank.requests))
            rank.server.fail("its engine died")
            with pytest.raises(Unavailable, match="a rank was lost: its engine died"):
                await stream.next()
            assert lost == [link]
            async with attached(address, lost) as late:
                with pytest.raises(Unavailable, match="its engine died"):
                    await late.start([request("two")]).next()

    asyncio.run(scenario())


def test_draining_waits_for_what_runs_and_sends_the_rest_elsewhere() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as link:
            one, two = link.start([request("one")]), link.start([request("two")])
            await until(lambda: len(rank.requests) == 2)
            draining = asyncio.create_task(rank.server.drain(0.2))
            await asyncio.sleep(0.05)
            late = link.start([request("late")])
            with pytest.raises(EngineLost, match="the rank is leaving") as caught:
                await late.next()
            assert not caught.value.died
            assert not draining.done()
            ended = SequenceDelta(rank.requests[0].sequence_id, finish_reason=FinishReason.LENGTH)
            rank.answer(ended)
            assert [delta.finish_reason for delta in await one.next()] == [FinishReason.LENGTH]
            await asyncio.wait_for(draining, 1.0)
            with pytest.raises(EngineLost, match="the rank is leaving"):
                await two.next()
            assert link.num_open == 0
            assert rank.requests[1].sequence_id in rank.cancelled

    asyncio.run(scenario())


def test_what_a_well_rank_has_lost_goes_elsewhere_and_nobody_died() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as link:
            stream = link.start([request("one")])
            await until(lambda: bool(rank.requests))
            rank.server.publish((), (), EngineLoad(), [(rank.requests[0].sequence_id, "parted in different turns")])
            with pytest.raises(EngineLost, match="parted in different turns") as caught:
                await stream.next()
            assert not caught.value.died

    asyncio.run(scenario())


def test_gateways_stay_attached_while_the_epoch_changes_and_a_newer_one_ends_the_rank() -> None:
    async def scenario() -> None:
        over: list[int] = []
        async with serving() as (rank, address, _), attached(address) as link:
            rank.server._on_over = over.append
            rank.server.epoch = 3
            stream = link.start([request("one")])
            await until(lambda: bool(rank.requests))
            rank.answer(SequenceDelta(rank.requests[0].sequence_id, (7,)))
            assert await stream.next() == [SequenceDelta("one", (7,))]
            late = RankLink(address, "gw", "s3cret", 2, lambda _: None)
            with pytest.raises(Unavailable, match="epoch 2 is over"):
                await late.connect()
            await late.close()
            assert over == []
            newer = RankLink(address, "gw", "s3cret", 4, lambda _: None)
            await newer.connect()
            await newer.close()
            assert over == [4]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "forming", "died"),
    [
        ({"state": RankState.LOST}, False, True),  # said outright
        ({"address": "127.0.0.1:1"}, False, True),  # another is in its seat
        ({"state": RankState.LOST}, True, False),  # it was computing nothing when it was lost
    ],
)
def test_streams_of_a_lost_rank_go_on_elsewhere_though_its_connection_holds(
    change: dict[str, Any], forming: bool, died: bool
) -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), following(address) as (backend, entry):
            await asyncio.wait_for(backend.available(), 5.0)
            stream = backend.start([request("one")])
            await until(lambda: bool(rank.requests))
            backend.update([GroupEntry("g", 1, 1, 2, (entry,), forming=forming)])
            backend.update([GroupEntry("g", 1, 1, 3, (replace(entry, **change),), forming=True)])
            with pytest.raises(EngineLost) as caught:
                await asyncio.wait_for(stream.next(), 1.0)
            assert caught.value.died is died
            with pytest.raises(Unavailable, match="no rank is serving now"):
                backend.start([request("two")])
            await until(lambda: bool(rank.cancelled))

    asyncio.run(scenario())


def test_a_rank_whose_process_is_gone_is_told_apart_though_the_directory_still_names_it() -> None:
    async def scenario() -> None:
        async with serving() as (_, address, server), following(address) as (backend, entry):
            assert (backend.unreachable(), backend.attached_groups()) == (set(), set())  # it was not tried yet
            await asyncio.wait_for(backend.available(), 5.0)
            assert (backend.unreachable(), backend.attached_groups()) == (set(), {"g"})
            await server.stop(0)
            await until(lambda: backend.unreachable() == {address})
            assert backend.attached_groups() == set()
            backend.update([GroupEntry("g", 1, 1, 3, (replace(entry, state=RankState.LOST),))])
            assert backend.unreachable() == set()

    asyncio.run(scenario())


@pytest.mark.parametrize("fate", ["it is reached again", "the directory drops it", "nobody can tell"])
def test_whether_a_rank_outlived_the_loss_of_its_connection(fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.cluster.ranks.backend.DEATH_S", 0.2 if fate == "nobody can tell" else 10.0)

    async def scenario() -> None:
        async with serving() as (_, address, server), following(address) as (backend, entry):
            await asyncio.wait_for(backend.available(), 5.0)
            stream = backend.start([request("one")])
            link = backend.link_of(address)
            assert link is not None
            if fate == "it is reached again":
                await link.break_off("cut")
            else:
                await server.stop(0)
            with pytest.raises(EngineLost) as lost:
                await stream.next()
            assert not await backend.outlived("g somewhere else")
            asked = asyncio.create_task(backend.outlived(lost.value.engine))
            if fate == "the directory drops it":
                await asyncio.sleep(0.05)
                assert not asked.done()
                backend.update([GroupEntry("g", 1, 1, 3, (replace(entry, state=RankState.LOST),))])
            assert await asyncio.wait_for(asked, 5.0) is (fate != "the directory drops it")

    asyncio.run(scenario())


def test_a_draining_rank_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), following(address) as (backend, entry):
            await asyncio.wait_for(backend.available(), 5.0)
            stream = backend.start([request("one")])
            await until(lambda: bool(rank.requests))
            backend.update([GroupEntry("g", 1, 1, 2, (replace(entry, state=RankState.DRAINING),))])
            with pytest.raises(Unavailable, match="no rank is serving now"):
                backend.start([request("two")])
            rank.answer(SequenceDelta(rank.requests[0].sequence_id, (7,), finish_reason=FinishReason.LENGTH))
            assert [delta.token_ids for delta in await stream.next()] == [(7,)]

    asyncio.run(scenario())


def test_the_load_is_known_from_the_start() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _):
            rank.server.publish((), (), EngineLoad(kv_blocks_total=77))
            async with attached(address) as link:
                await until(lambda: link.load.kv_blocks_total == 77)

    asyncio.run(scenario())


def test_a_group_that_leaves_gets_no_more_requests_but_ends_those_it_has() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _):
            backend = ClusterBackend("gw", "s3cret")
            here = GroupEntry("g", 1, 1, 2, (RankEntry(0, 0, RankState.SERVING, address),))
            backend.update([here])
            await backend.wait_attached()
            stream = backend.start([request("one")])
            await until(lambda: bool(rank.requests))
            backend.update([])
            with pytest.raises(Unavailable, match="no rank is serving now"):
                backend.start([request("two")])
            rank.answer(SequenceDelta(rank.requests[0].sequence_id, (7,), finish_reason=FinishReason.LENGTH))
            assert [delta.token_ids for delta in await stream.next()] == [(7,)]
            await backend.close()

    asyncio.run(scenario())


def test_a_rank_never_sees_a_name_of_an_earlier_connection_again() -> None:
    """Found by the simulator (seed 1822): a gateway had lost its connection and made a new one before the rank noticed.
    What was replayed had the name of what still ran, and tokens of one went to the other."""

    async def scenario() -> None:
        async with serving() as (rank, address, _):
            backend = ClusterBackend("gw", "s3cret")
            here = GroupEntry("g", 1, 1, 2, (RankEntry(0, 0, RankState.SERVING, address),))
            backend.update([here])
            await asyncio.wait_for(backend.available(), 5.0)
            first = backend.start([request("same")])
            await until(lambda: len(rank.requests) == 1)
            backend.update([])  # what runs may finish over the old connection
            backend.update([here])
            await asyncio.wait_for(backend.available(), 5.0)
            second = backend.start([request("same")])
            await until(lambda: len(rank.requests) == 2)
            old, new = (each.sequence_id for each in rank.requests)
            assert old != new
            rank.answer(SequenceDelta(old, (1,)), SequenceDelta(new, (2,)))
            assert await asyncio.wait_for(second.next(), 5.0) == [SequenceDelta("same", (2,))]
            assert await asyncio.wait_for(first.next(), 5.0) == [SequenceDelta("same", (1,))]
            await backend.close()

    asyncio.run(scenario())


def test_a_rank_refuses_a_name_that_another_connection_uses() -> None:
    async def scenario() -> None:
        async with serving() as (rank, address, _), attached(address) as one, attached(address) as other:
            first = one.start([request("same")])
            await until(lambda: len(rank.requests) == 1)
            with pytest.raises(Overloaded, match="in use"):
                await asyncio.wait_for(other.start([request("same")]).next(), 5.0)
            rank.answer(SequenceDelta(rank.requests[0].sequence_id, (1,)))
            assert await asyncio.wait_for(first.next(), 5.0) == [SequenceDelta("same", (1,))]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("secret", "epoch", "reason"), [("wrong", 2, "not a gateway"), ("s3cret", 1, "epoch 1 is over")]
)
def test_strangers_and_the_past_are_refused(secret: str, epoch: int, reason: str) -> None:
    async def scenario() -> None:
        async with serving() as (_, address, _):
            link = RankLink(address, "gw", secret, epoch, lambda _: None)
            with pytest.raises(Unavailable, match=reason):
                await link.connect()
            await link.close()

    asyncio.run(scenario())


class Silent(rank_pb2_grpc.RankServiceServicer):
    """Takes a question and does not answer."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def GetGroupExperts(self, request: pb.GetGroupExpertsRequest, context: Any) -> pb.GetGroupExpertsResponse:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError


def test_a_question_under_way_when_the_rank_is_lost_has_an_answer() -> None:
    async def scenario() -> None:
        server, silent = grpc.aio.server(), Silent()
        rank_pb2_grpc.add_RankServiceServicer_to_server(silent, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            link = RankLink(address, "gw", "s3cret", 2, lambda _: None)
            question = asyncio.create_task(link.experts())
            await silent.asked.wait()
            await link.close()
            with pytest.raises(Unavailable, match=f"rank at {address}: the connection was closed"):
                await asyncio.wait_for(question, 5.0)

            link = RankLink(address, "gw", "s3cret", 2, lambda _: None)
            silent.asked.clear()
            question = asyncio.create_task(link.experts())
            await silent.asked.wait()
            question.cancel()  # whoever asked has gone: that is no failure of the rank
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(question, 5.0)
            await link.close()
        finally:
            await server.stop(0)

    asyncio.run(scenario())
