"""What a gRPC client sees of a well-behaved server: streams, health, reflection, compression, an orderly stop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tests.edge.fakes import LIMITS, VOCAB_SIZE, FakeDefaults, FakeText, served
from tests.edge.serving import GENERATE, refused, rig, run

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.served import EdgeLimits
from moestro.cluster.edge.stub import StubBackend, stub_token
from moestro.protos.errors import Overloaded
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.gen import inference_pb2_grpc as pb_grpc
from moestro.protos.sequences import EngineLimits, FinishReason, SamplingParams, SequenceRequest
from moestro.workers.sampling.seeds import derive_seed

INFERENCE = "moestro.v1.InferenceService"


def ask(**changes: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(seed=5), stop=pb.StopParams(max_tokens=4))
    message.MergeFrom(pb.GenerateRequest(**changes))
    return message


def tokens_of(seed: int, count: int, prompt: str = "abc") -> list[int]:
    sequence = SequenceRequest("x", tuple(ord(c) - 32 for c in prompt), SamplingParams(seed=seed))
    return [stub_token(sequence, i, VOCAB_SIZE) for i in range(count)]


def test_choices_have_seeds_of_their_own_and_stream_and_unary_agree() -> None:
    async def test() -> None:
        async with rig() as it:
            sent = ask(output=pb.OutputParams(n=3, logprobs=2, prompt_logprobs=1), request_id="mine")
            events = await it.generate(sent)
            assert [e.sequence_number for e in events] == [0, 1, 2, 3]
            assert {e.request_id for e in events} == {"mine"}
            assert (events[0].seed, events[0].model) == (5, "fake")
            for index in range(3):
                got = [t for e in events for d in e.deltas if d.index == index for t in d.token_ids]
                assert got == tokens_of(derive_seed(5, index), 4)
            assert len(events[0].prompt_logprobs) == 3
            assert not events[0].prompt_logprobs[0].HasField("token")
            assert [e.HasField("usage") for e in events] == [False, False, False, True]
            assert (events[-1].usage.prompt_tokens, events[-1].usage.output_tokens) == (3, 12)
            whole = await it.stub.Complete(pb.CompleteRequest(request=sent))
            for choice in whole.choices:
                parts = [d for e in events for d in e.deltas if d.index == choice.index]
                assert choice.text == "".join(d.text for d in parts)
                assert list(choice.token_ids) == [t for d in parts for t in d.token_ids]
                assert list(choice.logprobs) == [p for d in parts for p in d.logprobs]
                assert choice.finish_reason == pb.FINISH_REASON_LENGTH
            assert whole.prompt_logprobs == events[0].prompt_logprobs

    run(test())


def test_seed_is_drawn_and_reported_and_gives_the_same_answer_again() -> None:
    async def test() -> None:
        async with rig() as it:
            sent = ask()
            sent.sampling.ClearField("seed")
            first = await it.generate(sent)
            again = await it.generate(ask(sampling=pb.SamplingParams(seed=first[0].seed)))
            assert [list(e.deltas[0].token_ids) for e in first] == [list(e.deltas[0].token_ids) for e in again]

    run(test())


def test_max_tokens_default_is_what_is_left_of_the_context() -> None:
    async def test() -> None:
        async with rig(StubBackend(EngineLimits(VOCAB_SIZE, max_context=20, max_waiting=8))) as it:
            sent = ask()
            sent.stop.ClearField("max_tokens")
            events = await it.generate(sent)
            assert sum(len(e.deltas[0].token_ids) for e in events) == 17

    run(test())


def test_checkpoint_defaults_hold_where_the_request_is_silent() -> None:
    eos = tokens_of(5, 3)[2]
    text = FakeText(generation=FakeDefaults(temperature=0.6, top_k=20, top_p=0.95, eos_token_ids=(eos,)))

    async def test() -> None:
        core = RequestCore([served(text=text)])
        with await core.open(ask(sampling=pb.SamplingParams(top_k=0, temperature=0.7))) as stream:
            params = stream.journal.admitted.sampling[0]
            assert (params.temperature, params.top_k, params.top_p, params.eos_token_ids) == (0.7, 0, 0.95, (eos,))
        completion = await core.complete(ask())
        assert (completion.finish_reason, len(completion.choices[0].token_ids)) == (FinishReason.EOS, 3)
        assert len(completion.text) == 2
        assert (await core.complete(ask(stop=pb.StopParams(ignore_eos=True)))).finish_reason is FinishReason.LENGTH
        assert core.num_open == 0

    run(test())


def test_stop_string_cancels_at_the_backend() -> None:
    async def test() -> None:
        async with rig() as it:
            text = "".join(chr(32 + t) for t in tokens_of(5, 30))
            sent = ask(stop=pb.StopParams(max_tokens=100, strings=["nope", text[10:13]]))
            events = await it.generate(sent)
            deltas = [d for e in events for d in e.deltas]
            assert "".join(d.text for d in deltas) == text[:10]
            assert (deltas[-1].finish_reason, deltas[-1].stop_string) == (pb.FINISH_REASON_STOP_STRING, text[10:13])
            assert events[-1].usage.output_tokens == 13
            assert len(it.backend.cancelled) == 1

    run(test())


def test_chat_and_text_services() -> None:
    async def test() -> None:
        async with rig() as it:
            message = pb.ChatMessage(role="user", content="hi")
            sent = pb.ChatRequest(messages=[message], stop=pb.StopParams(max_tokens=2))
            events = [r.event async for r in it.stub.Chat(sent)]
            assert events[-1].usage.prompt_tokens == len("<user>hi<assistant>")
            ids = (await it.stub.Tokenize(pb.TokenizeRequest(text="a b"))).token_ids
            assert list(ids) == [65, 0, 66]
            assert (await it.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "a b"
            model = (await it.stub.ListModels(pb.ListModelsRequest())).models[0]
            assert (model.name, model.max_context, model.vocab_size) == ("fake", LIMITS.max_context, VOCAB_SIZE)
            info = await it.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert (info.version, info.max_message_bytes, info.max_waiting) == ("test", 1 << 20, LIMITS.max_waiting)
            cluster = pb_grpc.ClusterServiceStub(it.channel)
            status = await cluster.GetClusterStatus(pb.GetClusterStatusRequest())
            assert (status.groups[0].name, status.open_streams) == ("g0", 0)

    run(test())


def test_failures_of_the_engine() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, fail_at=2)) as it:
            said = await refused(it.generate(ask(request_id="mine")))
            assert (said.code, said.reason, said.request_id) == (grpc.StatusCode.INTERNAL, "SEQUENCE_FAILED", "mine")
        async with rig(StubBackend(LIMITS, step_s=0.01)) as it:
            call = asyncio.ensure_future(it.generate(ask(stop=pb.StopParams(max_tokens=100))))
            await asyncio.sleep(0.1)
            it.backend.lose()
            said = await refused(call)
            assert (said.code, said.reason, said.retry_s) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", 1.0)

    run(test())


def test_an_unexpected_exception_says_nothing_but_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with rig() as it:
            it.backend.start = lambda sequences: open("/no/such/secret")  # type: ignore[method-assign, assignment, return-value]  # noqa: SIM115
            said = await refused(it.generate(ask(request_id="mine")))
            assert (said.code, said.message) == (grpc.StatusCode.INTERNAL, "internal error in request mine")
            assert said.request_id == "mine"
            assert said.fields == {}
            unnamed = await refused(it.generate(ask()))
            assert unnamed.request_id
            assert unnamed.request_id in unnamed.message

    run(test())
    assert "/no/such/secret" in caplog.text


def test_admission_gives_its_place_back_when_the_backend_refuses() -> None:
    async def test() -> None:
        core = RequestCore([served(StubBackend(EngineLimits(VOCAB_SIZE, 64, max_waiting=2)))])
        for _ in range(3):
            with pytest.raises(Overloaded):
                await core.open(ask(output=pb.OutputParams(n=3)))
        assert core.num_open == 0
        assert (await core.complete(ask(output=pb.OutputParams(n=2)))).usage.output_tokens == 8

    run(test())


def test_long_texts_leave_the_loop_free_and_are_bounded() -> None:
    class SlowText(FakeText):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.2)
            return super().encode(text[:10], add_special_tokens)

    async def test() -> None:
        core = RequestCore([served(text=SlowText())], EdgeLimits(max_text_calls=3))
        long = pb.TokenizeRequest(text="x" * 10_000)
        calls = [asyncio.ensure_future(core.tokenize(long)) for _ in range(5)]
        ticks = 0
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks >= 5, "the loop went on while threads tokenised"
        refusals = [call.exception() for call in calls if call.exception()]
        assert [type(error) for error in refusals] == [Overloaded, Overloaded]
        with pytest.raises(TimeoutError):
            await core.open(ask(text="x" * 10_000), timeout_s=0.05)
        assert core.num_open == 0
        assert len(await core.tokenize(long)) == 10, "places are given back"

    run(test())


def test_deadline_without_a_transport() -> None:
    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.02)
        core = RequestCore([served(backend)])
        with pytest.raises(TimeoutError):
            await core.open(ask(), timeout_s=0)
        assert backend.num_started == 0
        with pytest.raises(TimeoutError):
            await core.complete(ask(stop=pb.StopParams(max_tokens=200)), timeout_s=0.1)
        assert not backend.open_sequences
        assert core.num_open == 0

    run(test())


def test_health_by_service_and_before_stop() -> None:
    kind = health_pb2.HealthCheckResponse

    async def test() -> None:
        async with rig() as it:
            stub: Any = health_pb2_grpc.HealthStub(it.channel)
            for name in ("", INFERENCE, "moestro.v1.ClusterService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == kind.SERVING
            said = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nope")))
            assert said.code is grpc.StatusCode.NOT_FOUND
            watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=INFERENCE)))
            assert (await anext(watch)).status == kind.SERVING
            await it.server.set_serving(False)
            assert (await anext(watch)).status == kind.NOT_SERVING
            await it.server.set_serving(True)
            assert (await anext(watch)).status == kind.SERVING
            stopping = asyncio.ensure_future(it.server.stop(5))
            assert (await anext(watch)).status == kind.NOT_SERVING
            await it.channel.close()
            await stopping

    run(test())


@pytest.mark.parametrize("grace_s", [10.0, 0.05], ids=["finishes", "cancelled"])
def test_stop_lets_streams_finish_within_the_grace_period(grace_s: float) -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.01)) as it:
            call = aiter(it.stub.Generate(ask(stop=pb.StopParams(max_tokens=60))))
            await anext(call)
            stopping = asyncio.ensure_future(it.server.stop(grace_s))
            if grace_s > 1:
                assert len([r async for r in call]) == 59
            else:
                said = await refused(_drain(call))
                assert said.code is grpc.StatusCode.UNAVAILABLE
            await stopping
            late = await refused(it.generate(ask()))
            assert late.code is grpc.StatusCode.UNAVAILABLE

    run(test())


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(version: str) -> None:
    async def test() -> None:
        async with rig() as it:
            method = it.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE),
            ]
            services, file = [answer async for answer in method(iter(asked))]
            names = {s.name for s in services.list_services_response.service}
            assert {INFERENCE, "moestro.v1.ClusterService", "grpc.health.v1.Health"} <= names
            proto = descriptor_pb2.FileDescriptorProto.FromString(
                file.file_descriptor_response.file_descriptor_proto[0]
            )
            assert proto.package == "moestro.v1"

    run(test())


def test_gzip_in_and_out() -> None:
    """grpc hides the encoding from applications, so bytes on the wire are counted by a proxy."""

    async def test() -> None:
        async with rig() as it:
            counted = [0]
            proxy = await asyncio.start_server(lambda r, w: _relay(r, w, it.port, counted), "127.0.0.1", 0)
            port = proxy.sockets[0].getsockname()[1]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                tokenize = channel.unary_unary(f"/{INFERENCE}/Tokenize")
                data = pb.TokenizeRequest(text="a" * 100_000).SerializeToString()
                plain = pb.TokenizeResponse.FromString(await tokenize(data, compression=grpc.Compression.Gzip))
                assert list(plain.token_ids) == [65] * 100_000
                assert counted[0] < 20_000, "answers of some size are compressed"
                sizes = []
                for metadata in ((), (("moestro-compression", "gzip"),)):
                    before = counted[0]
                    sent = ask(output=pb.OutputParams(logprobs=20), stop=pb.StopParams(max_tokens=20))
                    call = channel.unary_stream(GENERATE)(sent.SerializeToString(), metadata=metadata)
                    assert len([r async for r in call]) == 20
                    sizes.append(counted[0] - before)
                assert sizes[1] < 0.8 * sizes[0]
            proxy.close()

    run(test())


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, counted: list[int]) -> None:
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, count: bool) -> None:
        while data := await source.read(65536):
            counted[0] += len(data) if count else 0
            target.write(data)
        target.close()

    await asyncio.gather(copy(reader, up_writer, False), copy(up_reader, writer, True), return_exceptions=True)
