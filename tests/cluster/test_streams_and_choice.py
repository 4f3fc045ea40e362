"""Deltas sorted into streams, the choice of a rank, and what the gateway says of the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from rich.text import Text

from moestro.cluster.cli.changes import changes
from moestro.cluster.cli.serve import ready_line
from moestro.cluster.client_results import cluster_status
from moestro.cluster.config import load_config
from moestro.cluster.delta_streams import DeltaStreams
from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.gateway import advertised, bracketed
from moestro.cluster.operations import group_message
from moestro.cluster.ranks.backend import ClusterBackend, least_loaded
from moestro.protos.errors import Overloaded, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLoad, FinishReason, SamplingParams, SequenceDelta, SequenceRequest


def in_loop(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


def requests(*names: str) -> list[SequenceRequest]:
    return [SequenceRequest(name, (1,), SamplingParams()) for name in names]


def end(engine_id: str) -> SequenceDelta:
    return SequenceDelta(engine_id, finish_reason=FinishReason.LENGTH)


def test_streams_get_their_own_and_nothing_after_their_end() -> None:
    async def scenario() -> None:
        cancelled: list[str] = []
        streams = DeltaStreams("gw", cancelled.append)
        one, (a,) = streams.open(requests("x"))
        two, (b, c) = streams.open(requests("x", "y"))
        assert len({a.sequence_id, b.sequence_id, c.sequence_id}) == 3
        assert all(each.sequence_id.startswith("gw.") for each in (a, b, c))
        streams.deliver(SequenceDelta(b.sequence_id, (7,)))
        streams.deliver(end(a.sequence_id))
        streams.deliver(SequenceDelta(a.sequence_id, (8,)))  # after its end
        streams.deliver(SequenceDelta("unknown", (9,)))
        assert await two.next() == [SequenceDelta("x", (7,))]
        assert await one.next() == [end("x")]
        assert len(streams) == 2
        two.cancel("y")
        two.cancel("y")
        one.close()  # has ended: nothing to tell the engine
        assert cancelled == [c.sequence_id]
        two.close()
        assert cancelled == [c.sequence_id, b.sequence_id]
        await streams.wait_none_open()

    in_loop(scenario())


def test_a_lost_engine_fails_each_stream_after_what_came() -> None:
    async def scenario() -> None:
        streams = DeltaStreams("gw", lambda _: None)
        one, (a,) = streams.open(requests("x"))
        two, _ = streams.open(requests("y"))
        streams.deliver(SequenceDelta(a.sequence_id, (7,)))
        streams.fail(Unavailable("lost"))
        streams.fail(Unavailable("again"))
        assert await one.next() == [SequenceDelta("x", (7,))]
        for stream in (one, two):
            with pytest.raises(Unavailable, match="lost"):
                await stream.next()
        assert len(streams) == 0
        await streams.wait_none_open()

    in_loop(scenario())


def test_a_refusal_ends_the_stream_and_waiters_hear_it() -> None:
    async def scenario() -> None:
        streams = DeltaStreams("gw", lambda _: None)
        stream, (a,) = streams.open(requests("x"))
        waiting = asyncio.create_task(streams.wait_none_open())
        await asyncio.sleep(0)
        assert not waiting.done()
        streams.refuse(a.sequence_id, "5 wait")
        with pytest.raises(Overloaded, match="5 wait"):
            await stream.next()
        await waiting

    in_loop(scenario())


def test_the_least_loaded_rank_takes_the_next() -> None:
    assert least_loaded([3, 1, 2], [0, 0, 0], 0) == 1
    assert least_loaded([3, 1, 2], [0, 9, 0], 0) == 2
    assert [least_loaded([0, 0, 0], [0, 0, 0], turn) for turn in range(4)] == [0, 1, 2, 0]
    assert [least_loaded([1, 0, 0], [0, 0, 0], turn) for turn in range(3)] == [1, 1, 2]
    placed = [0, 0, 0, 0]
    for turn in range(100):
        placed[least_loaded(placed, [0] * 4, turn % 4)] += 1
    assert placed == [25] * 4


def test_a_slow_rank_takes_as_many_times_less() -> None:
    placed = [0, 0, 0]
    for turn in range(110):
        placed[least_loaded(placed, [0] * 3, turn % 3, [1.0, 5.0, 1.0])] += 1
    assert placed == [50, 10, 50]
    assert least_loaded([0], [9], 0, [8.0]) == 0


def test_a_backend_without_ranks_is_unavailable() -> None:
    async def scenario() -> None:
        backend = ClusterBackend("gw", "secret")
        with pytest.raises(Unavailable, match="no rank") as caught:
            backend.start(requests("x"))
        assert caught.value.retry_after_s > 0
        await backend.close()

    in_loop(scenario())


def test_a_group_as_the_status_call_tells_it() -> None:
    ranks = tuple(
        RankEntry(rank // 2, rank % 2, RankState.SERVING, "" if rank % 2 else f"h:{rank}", resident_bytes=rank)
        for rank in range(4)
    )
    loads = {"h:0": EngineLoad(1, 2, 3, 4, 5, 0.5), "h:2": EngineLoad(num_steps=9, slowness=2.5)}
    group = GroupEntry("group-1", 2, 2, 7, ranks, activity="draining", spare_ranks=2)
    message = group_message(group, loads, frozenset())
    assert (message.name, message.dp, message.tp, message.epoch) == ("group-1", 2, 2, 7)
    assert [rank.name for rank in message.ranks] == [f"group-1 rank {number}" for number in range(4)]
    assert [rank.num_steps for rank in message.ranks] == [5, 5, 9, 9]  # a peer does what its leader does
    first = message.ranks[1]
    assert (first.num_running, first.num_waiting, first.kv_blocks_used, first.kv_blocks_total) == (1, 2, 3, 4)
    assert (first.step_seconds, first.resident_bytes, first.state) == (0.5, 1, pb.RANK_STATE_SERVING)
    assert [(rank.slowness, rank.straggler) for rank in message.ranks] == [(1, False)] * 2 + [(2.5, True)] * 2
    assert (message.activity, message.spare_ranks) == ("draining", 2)
    told = cluster_status(pb.GetClusterStatusResponse(groups=[message])).groups[0]
    assert (told.activity, told.spare_ranks) == ("draining", 2)
    assert [(rank.slowness, rank.straggler) for rank in told.ranks[1:3]] == [(1.0, False), (2.5, True)]


def test_ranks_that_cannot_be_reached_are_lost_whatever_the_directory_believes() -> None:
    ranks = tuple(
        RankEntry(rank // 2, rank % 2, RankState.SERVING, "" if rank % 2 else f"h:{rank}") for rank in range(4)
    )
    message = group_message(GroupEntry("group-0", 2, 2, 1, ranks), {}, frozenset({"h:2"}))
    lost, serving = pb.RANK_STATE_LOST, pb.RANK_STATE_SERVING
    assert [rank.state for rank in message.ranks] == [serving, serving, lost, lost]


@pytest.mark.parametrize("state", RankState)
def test_every_state_has_a_name_of_its_own(state: RankState) -> None:
    message = group_message(GroupEntry("group-0", 1, 1, 1, (RankEntry(0, 0, state),)), {}, frozenset())
    assert pb.RankState.Name(message.ranks[0].state) == f"RANK_STATE_{state.name}"


def test_addresses_a_client_can_call() -> None:
    assert advertised("127.0.0.1", 5, "here") == "127.0.0.1:5"
    assert advertised("0.0.0.0", 5, "here") == "here:5"
    assert advertised("::", 5, "here") == "here:5"
    assert advertised("::1", 5, "here") == "[::1]:5"
    assert bracketed("[::1]") == "[::1]"


def test_what_an_operator_is_told() -> None:
    config = load_config(None, {"model": {"name": "[red]x"}, "cluster": {"groups": 2, "dp": 1}})
    text = Text.from_markup(ready_line(config, ["[::1]:7", "b:8"], "127.0.0.1:8265", "127.0.0.1:6379")).plain
    assert text.startswith("ready  [red]x on [::1]:7, b:8, 2 groups of dp 1 x tp 1\n")
    assert 'Client("[::1]:7")' in text
    assert "http://127.0.0.1:8265  (--ray-address 127.0.0.1:6379)" in text


def group_of(*states: RankState, epoch: int = 1) -> GroupEntry:
    return GroupEntry("g", len(states), 1, epoch, tuple(RankEntry(i, 0, state) for i, state in enumerate(states)))


def test_an_operator_hears_of_what_comes_and_goes() -> None:
    up, lost, draining = RankState.SERVING, RankState.LOST, RankState.DRAINING
    cases = [
        (group_of(up), group_of(up), []),
        (group_of(up), group_of(lost), ["g is lost; Ray Serve starts it again"]),
        (group_of(lost), group_of(up, epoch=2), ["g serves, epoch 2"]),
        (group_of(up), group_of(up, epoch=2), ["g serves, epoch 2"]),
        (group_of(up, up), group_of(up, lost), ["g: 1 of 2 ranks serve"]),
        (group_of(up, lost), group_of(up, lost, epoch=2), []),
        (group_of(up, RankState.STARTING), group_of(up, up, epoch=3), ["g: all 2 ranks serve again, epoch 3"]),
        (group_of(up, up), group_of(draining, draining), []),
    ]
    for before, after, lines in cases:
        assert changes([before], [after]) == lines
    assert changes([group_of(up)], []) == ["g has left"]
    assert changes([group_of(draining)], []) == ["g has left"]
    assert changes([group_of(lost)], []) == []
    assert changes([], [group_of(up)]) == ["g serves, epoch 1"]
