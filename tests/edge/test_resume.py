"""A client that was cut off comes back, here or at another gateway, and in the end has the same answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edge.fakes import LIMITS, VOCAB_SIZE, FakeDefaults, FakeText, served
from tests.edge.serving import refused, rig, run

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.events import Completion, StreamEvent, gather
from moestro.cluster.edge.served import EdgeLimits, RecoveryLimits
from moestro.cluster.edge.stub import StubBackend
from moestro.cluster.edge.wire import FINISH_TO_PROTO
from moestro.protos.errors import InvalidRequest, Superseded
from moestro.protos.gen import inference_pb2 as pb


def ask(**changes: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(text="abc", request_id="mine", stop=pb.StopParams(max_tokens=8))
    message.MergeFrom(pb.GenerateRequest(**changes))
    return message


def resume_of(events: list[StreamEvent], with_tokens: bool) -> pb.Resume:
    """What a client says that has these events."""
    if not events:
        return pb.Resume()
    tokens: dict[int, list[int]] = {}
    endings: dict[int, Any] = {}
    for event in events:
        for delta in event.deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
            endings[delta.index] = FINISH_TO_PROTO[delta.finish_reason]
    choices = [pb.ResumedChoice(index=i, token_ids=tokens[i], finish_reason=endings[i]) for i in tokens]
    return pb.Resume(last_sequence_number=events[-1].sequence_number, choices=choices if with_tokens else ())


def resumed(request: pb.GenerateRequest, resume: pb.Resume) -> pb.GenerateRequest:
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.resume.CopyFrom(resume)
    return again


async def some(core: RequestCore, request: pb.GenerateRequest, sent: int, arrived: int) -> list[StreamEvent]:
    """Reads up to ``sent`` events, then is cut off with ``arrived`` of them."""
    events: list[StreamEvent] = []
    with await core.open(request) as stream:
        while len(events) < sent and (event := await stream.next()) is not None:
            events.append(event)
    return events[:arrived]


def answer_of(whole: Completion) -> tuple[Any, ...]:
    return whole.choices, whole.seed, whole.model, whole.prompt_logprobs, whole.usage.output_tokens


cuts = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans()).map(
        lambda cut: (max(cut[:2]), min(cut[:2]), cut[2], cut[3])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(
    cuts=cuts,
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 12),
    logprobs=st.none() | st.integers(0, 2),
    stop_at=st.none() | st.tuples(st.integers(0, 10), st.integers(1, 5)),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_wherever_it_is_cut_off_the_answer_is_the_same(
    cuts: list[tuple[int, int, bool, bool]],
    n: int,
    max_tokens: int,
    logprobs: int | None,
    stop_at: tuple[int, int] | None,
    seed: int | None,
) -> None:
    """``cuts``: events sent, events that arrived, whether the client tells its tokens, whether it goes elsewhere;
    ``stop_at``: a part of the answer (from, length) that is a stop string, beside one that begins like it."""
    request = ask(
        stop=pb.StopParams(max_tokens=max_tokens),
        output=pb.OutputParams(n=n, logprobs=logprobs, prompt_logprobs=logprobs),
        sampling=pb.SamplingParams(seed=seed),
    )

    async def test() -> None:
        if stop_at is not None:
            text = (await RequestCore([served()]).complete(request)).text
            stop = text[stop_at[0] :][: stop_at[1]] or "none"
            request.stop.strings.extend([stop, stop + "~never"])
        undisturbed = gather([event async for event in RequestCore([served()]).stream(request)])
        cores = [RequestCore([served()]) for _ in range(2)]
        at, events, asked = 0, list[StreamEvent](), request
        for sent, arrived, with_tokens, elsewhere in cuts:
            events += await some(cores[at], asked, sent, arrived)
            at = (at + elsewhere) % 2
            asked = resumed(request, resume_of(events, with_tokens or elsewhere))
        events += [event async for event in cores[at].stream(asked)]
        assert answer_of(gather(events)) == answer_of(undisturbed)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert not any(each.num_open for each in cores)

    run(test())


def test_the_number_alone_is_enough_where_the_stream_is_remembered() -> None:
    async def test() -> None:
        async with rig() as it:
            request = ask(output=pb.OutputParams(n=2, logprobs=1))
            whole = gather([event async for event in RequestCore([served()]).stream(request)])
            first = await some(it.core, request, 5, 3)
            assert it.core.num_parked == 1
            rest = await it.generate(resumed(request, pb.Resume(last_sequence_number=2)))
            assert [event.sequence_number for event in rest] == [3, 4, 5, 6, 7]
            text = "".join(e.text for e in first) + "".join(d.text for e in rest for d in e.deltas if d.index == 0)
            assert text == whole.text
            # The end may have been lost on the way, too.
            again = await it.generate(resumed(request, pb.Resume(last_sequence_number=5)))
            assert [event.sequence_number for event in again] == [6, 7]
            assert again[-1].usage.output_tokens == 16
            assert await it.generate(resumed(request, pb.Resume(last_sequence_number=7))) == []

    run(test())


def test_a_stream_whose_cut_nobody_noticed_is_taken_over() -> None:
    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.005)
        core = RequestCore([served(backend)])
        request = ask(stop=pb.StopParams(max_tokens=40))
        old = await core.open(request)
        events = [await old.next() for _ in range(3)]
        waiting = asyncio.ensure_future(old.next())
        await asyncio.sleep(0)
        new = await core.open(resumed(request, pb.Resume(last_sequence_number=1)))
        with pytest.raises(Superseded):
            await waiting
        with pytest.raises(Superseded):
            await old.next()
        assert core.num_open == 1
        assert len(backend.open_sequences) == 1
        got = [event for event in events[:2] if event is not None] + [event async for event in new]
        healthy = RequestCore([served()])
        assert gather(got).choices == (await healthy.complete(request)).choices
        assert core.num_open == 0

    run(test())


def test_taking_over_is_for_the_same_request_only() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.005)) as it:
            request = ask(stop=pb.StopParams(max_tokens=200))
            call = it.stub.Generate(request)
            await call.read()
            other = resumed(request, pb.Resume(last_sequence_number=0))
            other.text = "abd"
            said = await refused(it.generate(other))
            assert said.fields == {"resume": "the rest of the request is not as it was"}
            assert (await call.read()).event.sequence_number == 1, "the open stream is unharmed"
            newer = it.stub.Generate(resumed(request, pb.Resume(last_sequence_number=0)))
            assert (await newer.read()).event.sequence_number == 1
            assert await call.code() is grpc.StatusCode.ABORTED
            newer.cancel()

    run(test())


def test_what_is_remembered_is_bounded_in_number_and_time() -> None:
    async def test() -> None:
        limits = EdgeLimits(recovery=RecoveryLimits(resume_s=0.2, max_parked=3))
        core = RequestCore([served()], limits)
        for number in range(5):
            await some(core, ask(request_id=f"cut {number}".replace(" ", "-")), 2, 2)
        assert core.num_parked == 3
        async for _ in core.stream(ask(request_id="ended")):
            pass
        assert core.num_parked == 3, "one that was sent to its end goes first"
        assert (await core.open(resumed(ask(request_id="cut-4"), pb.Resume(last_sequence_number=1)))).close() is None
        with pytest.raises(InvalidRequest, match="nothing is remembered"):
            await core.open(resumed(ask(request_id="cut-0"), pb.Resume(last_sequence_number=1)))
        with pytest.raises(InvalidRequest, match="nothing is remembered"):
            await core.open(resumed(ask(request_id="ended"), pb.Resume(last_sequence_number=1)))
        await asyncio.sleep(0.25)
        assert core.num_parked == 0
        none = RequestCore([served()], EdgeLimits(recovery=RecoveryLimits(max_parked=0)))
        await some(none, ask(), 2, 2)
        assert none.num_parked == 0
        answer = await core.complete(ask())
        assert core.num_parked == 0, "an answer in one piece cannot be resumed"
        assert answer.usage.output_tokens == 8

    run(test())


EOS = 7
BAD: list[tuple[pb.Resume, str, str]] = [
    (pb.Resume(choices=[pb.ResumedChoice(token_ids=[1])]), "resume.last_sequence_number", "must be set"),
    (pb.Resume(last_sequence_number=2**53), "resume.last_sequence_number", "must be below"),
    (pb.Resume(last_sequence_number=3), "resume.choices", "nothing is remembered here"),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(index=2, token_ids=[1])]),
        "resume.choices[0].index",
        "must be below output.n = 2, is 2",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(index=1), pb.ResumedChoice(index=1)]),
        "resume.choices[1].index",
        "comes more than once: 1",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(token_ids=[1, VOCAB_SIZE])]),
        "resume.choices[0].token_ids[1]",
        "must be below the vocabulary size 95, is 95",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(finish_reason=99)]),  # type: ignore[arg-type]
        "resume.choices[0].finish_reason",
        "is none that is known: 99",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(token_ids=[1] * 9)]),
        "resume.choices",
        "choice 0 has 9 tokens, and max_tokens is 8",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(token_ids=[1] * 8)]),
        "resume.choices",
        "choice 0 has all of its max_tokens = 8 tokens, so its finish_reason must be set",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(token_ids=[1, EOS])]),
        "resume.choices",
        "choice 0 holds an end or stop token, so its finish_reason must be set",
    ),
    (
        pb.Resume(last_sequence_number=0, choices=[pb.ResumedChoice(token_ids=[1, 33, 34, 35])]),
        "resume.choices",
        "choice 0 holds a stop string, so its finish_reason must be set",
    ),
]


@pytest.mark.parametrize(("resume", "field", "described"), BAD)
def test_what_cannot_be_is_refused_by_name(resume: pb.Resume, field: str, described: str) -> None:
    async def test() -> None:
        async with rig(text=FakeText(generation=FakeDefaults(eos_token_ids=(EOS,)))) as it:
            request = ask(output=pb.OutputParams(n=2), stop=pb.StopParams(strings=["ABC"]))
            said = await refused(it.generate(resumed(request, resume)))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert list(said.fields) == [field]
            assert described in said.fields[field]
            assert it.backend.num_started == 0

    run(test())


def test_a_number_that_was_never_sent_and_a_resume_where_there_is_none() -> None:
    async def test() -> None:
        async with rig() as it:
            await some(it.core, ask(), 3, 3)
            said = await refused(it.generate(resumed(ask(), pb.Resume(last_sequence_number=3))))
            assert said.fields == {"resume.last_sequence_number": "must be in [-1, 2], is 3"}
            whole = pb.CompleteRequest(request=resumed(ask(), pb.Resume()))
            said = await refused(it.stub.Complete(whole))
            assert said.fields == {"request.resume": "must be absent: only a stream can be resumed"}
            unnamed = resumed(ask(), pb.Resume())
            unnamed.request_id = ""
            with pytest.raises(InvalidRequest, match="request_id: must be that of the stream"):
                await it.core.open(unnamed)

    run(test())


def test_without_a_seed_the_request_id_gives_it() -> None:
    async def test() -> None:
        core = RequestCore([served()])
        first, again = [await core.complete(ask()) for _ in range(2)]
        assert (first.seed, first.choices) == (again.seed, again.choices)
        seeds = {(await core.complete(ask(request_id=f"r{i}"))).seed for i in range(20)}
        unnamed = ask()
        unnamed.request_id = ""
        seeds |= {(await core.complete(unnamed)).seed for _ in range(20)}
        assert len(seeds) == 40

    run(test())


def test_a_request_whose_client_was_cut_off_while_it_was_admitted_is_taken_over_too() -> None:
    class SlowText(FakeText):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.2)
            return super().encode(text[:10], add_special_tokens)

    async def test() -> None:
        core = RequestCore([served(text=SlowText())])
        request = ask(text="x" * 10_000)
        first = asyncio.ensure_future(core.open(request))
        await asyncio.sleep(0.05)
        other = resumed(request, pb.Resume())
        other.stop.max_tokens = 7
        with pytest.raises(InvalidRequest, match="not as it was"):
            await core.open(other)
        with pytest.raises(InvalidRequest, match="is that of an open request"):
            await core.open(request)
        events = [event async for event in core.stream(resumed(request, pb.Resume()))]
        assert gather(events).usage.output_tokens == 8
        with pytest.raises(Superseded):
            await first
        assert core.num_open == 0

    run(test())
