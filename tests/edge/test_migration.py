"""Engines are lost at any point, and the caller sees the same answer: no token lost or doubled, no gap in numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edge.fakes import LIMITS, served
from tests.edge.serving import refused, rig, run

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.journal import PROGRESS
from moestro.cluster.edge.served import EdgeLimits, RecoveryLimits
from moestro.cluster.edge.stub import Fault, StubBackend
from moestro.protos.errors import EngineLost, Overloaded, Quarantined, Unavailable
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import SequenceRequest

MANY = EdgeLimits(recovery=RecoveryLimits(migrations=1000))
SEED = 5


def ask(text: str = "abc", **changes: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(text=text, sampling=pb.SamplingParams(seed=SEED), stop=pb.StopParams(max_tokens=8))
    message.MergeFrom(pb.GenerateRequest(**changes))
    return message


async def events_of(core: RequestCore, request: pb.GenerateRequest | pb.ChatRequest) -> list[StreamEvent]:
    return [event async for event in core.stream(request)]


async def gathered(request: pb.GenerateRequest | pb.ChatRequest) -> Completion:
    return gather(await events_of(RequestCore([served()]), request))


def same_answer(one: Completion, other: Completion) -> bool:
    return (one.choices, one.seed, one.prompt_logprobs) == (other.choices, other.seed, other.prompt_logprobs)


faults = st.lists(
    st.builds(Fault, after_steps=st.integers(0, 4), died=st.just(False), refuses=st.booleans())
    | st.builds(Fault, after_steps=st.integers(PROGRESS, 6)),
    max_size=8,
)
requests = st.builds(
    lambda n, max_tokens, logprobs, chat: (
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="hi")],
            sampling=pb.SamplingParams(seed=SEED),
            stop=pb.StopParams(max_tokens=max_tokens),
            output=pb.OutputParams(n=n, logprobs=logprobs, prompt_logprobs=logprobs),
        )
        if chat
        else ask(
            stop=pb.StopParams(max_tokens=max_tokens),
            output=pb.OutputParams(n=n, logprobs=logprobs, prompt_logprobs=logprobs),
        )
    ),
    n=st.integers(1, 4),
    max_tokens=st.integers(1, 16),
    logprobs=st.none() | st.integers(0, 3),
    chat=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(requests, faults, st.none() | st.tuples(st.integers(0, 10), st.integers(1, 5)))
def test_wherever_engines_are_lost_the_answer_is_the_same(
    request: pb.GenerateRequest | pb.ChatRequest, faults: list[Fault], stop_at: tuple[int, int] | None
) -> None:
    """``stop_at``: a part of the answer (from, length) that is a stop string, beside one that begins like it."""
    faults = [Fault(2), *faults]  # the first start of all would be refused to the caller

    async def test() -> None:
        if stop_at is not None:
            text = (await gathered(request)).text
            stop = text[stop_at[0] :][: stop_at[1]] or "none"
            request.stop.strings.extend([stop, stop + "~never"])
        undisturbed = await gathered(request)
        backend = StubBackend(LIMITS, faults=faults)
        core = RequestCore([served(backend)], MANY)
        events = await events_of(core, request)
        assert same_answer(gather(events), undisturbed)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.usage is None for event in events] == [True] * (len(events) - 1) + [False]
        assert sum(event.prompt_logprobs is not None for event in events) == request.output.HasField("prompt_logprobs")
        assert not backend.open_sequences
        assert not core.num_open

    run(test())


def test_a_loss_is_counted_and_its_time_is_kept() -> None:
    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.002, faults=[Fault(3), Fault(2, died=False)])
        core = RequestCore([served(backend)])
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        answer = await core.complete(ask(stop=pb.StopParams(max_tokens=8, strings=["\x7f"])))
        took_s = loop.time() - began_s
        usage = answer.usage
        assert (usage.output_tokens, usage.migrations) == (8, 2)
        assert 0.010 <= usage.queued_s + usage.prefill_s + usage.decode_s <= took_s

    run(test())


def test_the_fourth_loss_is_too_many() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, faults=[Fault(1, died=False)] * 4)) as it:
            said = await refused(it.generate(ask()))
            assert (said.code, said.reason, said.retry_s) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", 1.0)
            assert "lost 4 times" in said.message
        async with rig(StubBackend(LIMITS, faults=[Fault(1, died=False)] * 3)) as it:
            assert (await it.generate(ask()))[-1].usage.migrations == 3

    run(test())


class Away(StubBackend):
    """Has no engine for a while after each loss."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(LIMITS, faults=faults)
        self.back = asyncio.Event()

    async def available(self) -> None:
        await self.back.wait()


def test_it_waits_for_an_engine_as_long_as_its_patience_lasts() -> None:
    async def test() -> None:
        backend = Away([Fault(2)])
        core = RequestCore([served(backend)], EdgeLimits(recovery=RecoveryLimits(patience_s=0.05)))
        with pytest.raises(Unavailable, match=r"within 0\.05 s"):
            await core.complete(ask())
        assert not core.num_open
        backend = Away([Fault(2)])
        core = RequestCore([served(backend)])
        asyncio.get_running_loop().call_later(0.05, backend.back.set)
        answer = await core.complete(ask())
        assert answer.usage.queued_s >= 0.04
        backend = Away([Fault(2)])
        core = RequestCore([served(backend)])
        with pytest.raises(TimeoutError):
            await core.complete(ask(), timeout_s=0.05)
        assert not core.num_open

    run(test())


def test_the_first_engine_may_refuse_and_a_later_one_may_not() -> None:
    async def test() -> None:
        core = RequestCore([served(StubBackend(LIMITS, faults=[Fault(0, refuses=True)]))])
        with pytest.raises(Overloaded):
            await core.complete(ask())
        core = RequestCore([served(StubBackend(LIMITS, faults=[Fault(2), *[Fault(0, refuses=True)] * 3]))])
        assert (await core.complete(ask())).usage.migrations == 1

    run(test())


def test_a_rank_that_was_asked_for_is_not_asked_for_again() -> None:
    class Asked(StubBackend):
        def start(self, sequences: Any) -> Any:
            ranks.append(sequences[0].diagnostics.rank)
            return super().start(sequences)

    ranks: list[str] = []

    async def test() -> None:
        core = RequestCore([served(Asked(LIMITS, faults=[Fault(1)]))])
        await core.complete(ask(diagnostics=pb.Diagnostics(rank="rank 3")))
        assert ranks == ["rank 3", ""]

    run(test())


def kills_at(position: int, prompt: str) -> Callable[[SequenceRequest, int], bool]:
    ids = tuple(ord(c) - 32 for c in prompt)
    return lambda sequence, at: sequence.prompt_ids == ids and at == position


@pytest.mark.parametrize("position", [0, 3])
def test_a_request_that_killed_two_engines_is_not_tried_a_third_time(position: int) -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, poison=kills_at(position, "bad"))) as it:
            said = await refused(it.generate(ask("bad", request_id="mine")))
            assert (said.code, said.reason, said.request_id) == (grpc.StatusCode.INTERNAL, "QUARANTINED", "mine")
            assert it.backend.num_deaths == 2
            recovery = it.core.recovery
            assert (recovery.num_losses, recovery.num_quarantined) == (2, 1)
            (incident,) = recovery.incidents.latest()
            assert incident.name in said.message
            assert (incident.request_id, incident.num_prompt_tokens) == ("mine", 3)
            assert incident.num_output_tokens == (position,)
            assert [death.engine for death in incident.deaths] == ["stub 1", "stub 2"]
            again = ask("bad", request_id="mine", resume=pb.Resume())
            assert (await refused(it.generate(again))).reason == "QUARANTINED"
            assert it.backend.num_deaths == 2
            assert (await it.generate(ask("good")))[-1].usage.output_tokens == 8

    run(test())


def test_tokens_that_died_on_their_way_are_no_alibi() -> None:
    """An engine dies with tokens that it has drawn and not yet told, so the next one dies a few tokens further."""

    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.001)
        bad = [kills_at(3, "bad"), kills_at(5, "bad")]
        backend.poison = lambda sequence, at: bad[min(backend.num_deaths, 1)](sequence, at)
        core = RequestCore([served(backend)])
        with pytest.raises(Quarantined):
            await core.complete(ask("bad"))
        assert backend.num_deaths == 2
        # In company: a neighbour that waits for its first token must not be taken for the one that kills.
        backend.num_deaths = 0
        slow = SlowStarts(backend, "good")
        core = RequestCore([served(slow)])
        answers = await asyncio.gather(core.complete(ask("good")), core.complete(ask("bad")), return_exceptions=True)
        assert isinstance(answers[0], Completion), answers[0]
        assert isinstance(answers[1], Quarantined)

    run(test())


class SlowStarts(StubBackend):
    """Takes its time over the first token of every replay of one prompt."""

    def __init__(self, like: StubBackend, prompt: str) -> None:
        super().__init__(LIMITS, step_s=0.001, poison=like.poison)
        like.kill = self.kill  # type: ignore[method-assign]
        self._like, self._prompt = like, tuple(ord(c) - 32 for c in prompt)

    def kill(self) -> None:
        self._like.num_deaths += 1
        super().kill()

    def start(self, sequences: Any) -> Any:
        stream = super().start(sequences)
        if sequences[0].prompt_ids == self._prompt and sequences[0].output_ids:
            quick = stream.next

            async def slow() -> Any:
                stream.next = quick
                await asyncio.sleep(0.02)
                return await quick()

            stream.next = slow
        return stream


@pytest.mark.parametrize("n", [1, 3])
def test_its_neighbours_come_through(n: int) -> None:
    """They lose their engine with it, before their replays have had a token; only the one that kills is refused."""

    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.001, poison=kills_at(5, "bad"))
        core = RequestCore([served(backend)])
        texts = [f"good {i}" for i in range(12)]
        output = pb.OutputParams(n=n)
        asked = [core.complete(ask(text, output=output)) for text in [*texts[:6], "bad", *texts[6:]]]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        bad = answers.pop(6)
        assert isinstance(bad, Quarantined)
        assert backend.num_deaths <= 3
        healthy = RequestCore([served()])
        for text, answer in zip(texts, answers, strict=True):
            assert isinstance(answer, Completion), answer
            assert same_answer(answer, await healthy.complete(ask(text, output=output)))
        assert not core.num_open

    run(test())


def test_who_got_further_is_innocent_and_so_is_who_was_asked_to_go() -> None:
    async def test() -> None:
        long = ask(stop=pb.StopParams(max_tokens=30))
        for faults in ([Fault(PROGRESS)] * 6, [Fault(0, died=False)] * 6):
            core = RequestCore([served(StubBackend(LIMITS, faults=faults))], MANY)
            assert (await core.complete(long)).usage.migrations == 6
        core = RequestCore([served(StubBackend(LIMITS, faults=[Fault(2), Fault(0, died=False), Fault(0)]))], MANY)
        with pytest.raises(Quarantined):
            await core.complete(ask())

    run(test())


class Cut(StubBackend):
    """The connections to some engines break, and these live on."""

    def __init__(self, faults: list[Fault], living: set[str]) -> None:
        super().__init__(LIMITS, faults=faults)
        self._living = living

    async def outlived(self, engine: str) -> bool:
        await asyncio.sleep(0.01)
        return engine in self._living


def test_an_engine_that_lives_on_was_not_killed() -> None:
    """Found by the simulator (seed 2182): a rank was killed and a connection was cut, and the request was refused."""

    async def test() -> None:
        for living in ({"stub"}, set[str]()):
            core = RequestCore([served(Cut([Fault(2), Fault(0)], living))], MANY)
            if living:
                assert (await core.complete(ask())).usage.migrations == 2
            else:
                with pytest.raises(Quarantined):
                    await core.complete(ask())
            assert not core.num_open
            assert len(core.recovery.incidents.latest()) == (not living)

    run(test())


def test_a_stream_that_is_closed_while_the_fate_of_its_engine_is_asked_for_is_closed() -> None:
    class Unknown(StubBackend):
        asked = asyncio.Event()

        async def outlived(self, engine: str) -> bool:
            self.asked.set()
            return await asyncio.Event().wait()

    async def test() -> None:
        backend = Unknown(LIMITS, faults=[Fault(2), Fault(0)])
        async with rig(backend) as it:
            reading = asyncio.create_task(it.generate(ask()))
            await asyncio.wait_for(backend.asked.wait(), 5.0)
            reading.cancel()
            await it.settled()

    run(test())


def test_the_engine_is_told_to_drop_what_was_lost_only_in_part() -> None:
    """One sequence of three is given up by an engine that is well: all go on elsewhere, and the two are cancelled."""

    async def test() -> None:
        backend = StubBackend(LIMITS)
        core = RequestCore([served(backend)])
        with await core.open(ask(output=pb.OutputParams(n=3), request_id="r")) as stream:
            await stream.next()
            (first,) = backend.streams
            del first.positions["r/1"]
            first.next = lost  # type: ignore[method-assign]
            rest = [event async for event in stream]
        assert sorted(backend.cancelled) == ["r/0", "r/2"]
        assert rest[-1].usage is not None
        assert (rest[-1].usage.output_tokens, rest[-1].usage.migrations) == (24, 1)

    async def lost() -> Any:
        raise EngineLost("given up", died=False)

    run(test())


def test_a_stream_that_is_closed_while_it_waits_for_an_engine_starts_nothing() -> None:
    async def test() -> None:
        backend = Away([Fault(1)])
        core = RequestCore([served(backend)])
        stream = await core.open(ask())
        await stream.next()
        waiting = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0.01)
        stream.close()
        backend.back.set()
        with pytest.raises(Unavailable, match="was closed"):
            await waiting
        assert backend.num_started == 1
        backend = Away([Fault(1)])
        core = RequestCore([served(backend)])
        stream = await core.open(ask())
        await stream.next()
        waiting = asyncio.ensure_future(stream.next())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert core.num_open == 0

    run(test())
