"""Everything a client can send that can never work: a canonical status with the field's name, nothing left behind,
neighbours unharmed. Against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import grpc
import pytest
from tests.edge.fakes import LIMITS, VOCAB_SIZE
from tests.edge.serving import GENERATE, Rig, raw_http2, refused, rig, run

from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits
from moestro.cluster.edge.stub import StubBackend, StubCluster, stub_token
from moestro.protos.errors import ConfigError
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import SamplingParams, SequenceRequest

CONTEXT = LIMITS.max_context


def request(**changes: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(seed=5), stop=pb.StopParams(max_tokens=4))
    message.MergeFrom(pb.GenerateRequest(**changes))
    return message


def expected_tokens(prompt: str, seed: int, count: int) -> list[int]:
    sequence = SequenceRequest("x", tuple(ord(c) - 32 for c in prompt), SamplingParams(seed=seed))
    return [stub_token(sequence, position, VOCAB_SIZE) for position in range(count)]


@contextlib.asynccontextmanager
async def neighbour(it: Rig) -> Any:
    """A well-behaved stream that is open all the while and must get exactly its tokens."""
    count = 200
    asked = request(text="neighbour", stop=pb.StopParams(max_tokens=count))
    stream = aiter(it.stub.Generate(asked))
    first = await anext(stream)
    yield
    events = [first.event, *[response.event async for response in stream]]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [t for e in events for d in e.deltas for t in d.token_ids] == expected_tokens("neighbour", 5, count)
    assert events[-1].usage.output_tokens == count


CASES: dict[str, tuple[pb.GenerateRequest, dict[str, str]]] = {
    "empty prompt": (request(text=""), {"text": "must not be empty"}),
    "no prompt": (pb.GenerateRequest(), {"prompt": "one of text and token_ids must be set"}),
    "no token ids": (request(token_ids=pb.TokenIds()), {"token_ids.ids": "must not be empty"}),
    "token id out of range": (
        request(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE, 2, 2**32 - 1])),
        {"token_ids.ids[1]": f"{VOCAB_SIZE}, is {VOCAB_SIZE}", "token_ids.ids[3]": f"is {2**32 - 1}"},
    ),
    "prompt longer than the context": (
        request(text="x" * (CONTEXT + 1)),
        {"text": f"context of {CONTEXT}, is {CONTEXT + 1} tokens long"},
    ),
    "prompt as long as the context": (request(text="x" * CONTEXT), {"text": f"is {CONTEXT} tokens long"}),
    "temperature nan": (request(sampling=pb.SamplingParams(temperature=math.nan)), {"sampling.temperature": "is nan"}),
    "temperature negative": (request(sampling=pb.SamplingParams(temperature=-0.1)), {"sampling.temperature": "-0.1"}),
    "temperature huge": (request(sampling=pb.SamplingParams(temperature=1e300)), {"sampling.temperature": "1e+300"}),
    "temperature infinite": (
        request(sampling=pb.SamplingParams(temperature=math.inf)),
        {"sampling.temperature": "inf"},
    ),
    "top_p of 0": (request(sampling=pb.SamplingParams(top_p=0)), {"sampling.top_p": "must be in (0, 1], is 0.0"}),
    "top_p of 2": (request(sampling=pb.SamplingParams(top_p=2)), {"sampling.top_p": "must be in (0, 1], is 2.0"}),
    "min_p nan": (request(sampling=pb.SamplingParams(min_p=math.nan)), {"sampling.min_p": "nan"}),
    "top_k negative": (request(sampling=pb.SamplingParams(top_k=-1)), {"sampling.top_k": "at least 0, is -1"}),
    "n of 0": (request(output=pb.OutputParams(n=0)), {"output.n": "must be in [1, 128], is 0"}),
    "n of 10,000": (request(output=pb.OutputParams(n=10_000)), {"output.n": "is 10000"}),
    "max_tokens of 0": (request(stop=pb.StopParams(max_tokens=0)), {"stop.max_tokens": "at least 1, is 0"}),
    "max_tokens of -1": (request(stop=pb.StopParams(max_tokens=-1)), {"stop.max_tokens": "at least 1, is -1"}),
    "max_tokens of 2^31-1": (
        request(stop=pb.StopParams(max_tokens=2**31 - 1)),
        {"stop.max_tokens": f"must be at most {CONTEXT - 3}, is {2**31 - 1}"},
    ),
    "min_tokens over max_tokens": (
        request(stop=pb.StopParams(min_tokens=5)),
        {"stop.min_tokens": "max_tokens 4, is 5"},
    ),
    "1,000 stop strings": (request(stop=pb.StopParams(strings=["x"] * 1000)), {"stop.strings": "at most 16, are 1000"}),
    "stop string of 1 MB": (
        request(stop=pb.StopParams(strings=["a", "b" * 1_000_000])),
        {"stop.strings[1]": "must be 1 to 256 characters, is 1000000"},
    ),
    "empty stop string": (request(stop=pb.StopParams(strings=[""])), {"stop.strings[0]": "is 0"}),
    "stop token unknown": (request(stop=pb.StopParams(token_ids=[VOCAB_SIZE])), {"stop.token_ids[0]": "is 95"}),
    "logit_bias on unknown ids": (
        request(sampling=pb.SamplingParams(logit_bias={3: 1.0, 9999: 1.0})),
        {"sampling.logit_bias[9999]": f"must be below {VOCAB_SIZE}, is 9999"},
    ),
    "logit_bias nan": (
        request(sampling=pb.SamplingParams(logit_bias={3: math.nan})),
        {"sampling.logit_bias[3]": "nan"},
    ),
    "logprobs of 21": (request(output=pb.OutputParams(logprobs=21)), {"output.logprobs": "[0, 20], is 21"}),
    "priority": (request(priority=101), {"priority": "[-100, 100], is 101"}),
    "max_chunk beyond the context": (
        request(diagnostics=pb.Diagnostics(max_chunk=2**32 - 1)),
        {"diagnostics.max_chunk": f"[0, {CONTEXT}], is {2**32 - 1}"},
    ),
    "preempt_at beyond the context": (
        request(diagnostics=pb.Diagnostics(preempt_at=CONTEXT + 1)),
        {"diagnostics.preempt_at": f"[0, {CONTEXT}], is {CONTEXT + 1}"},
    ),
    "request id with a line break": (request(request_id="a\nb"), {"request_id": "printable ASCII"}),
    "long request id": (request(request_id="a" * 129), {"request_id": "at most 128 characters, is 129"}),
    "many at once": (
        request(sampling=pb.SamplingParams(temperature=-1, top_p=3), output=pb.OutputParams(n=0), priority=-500),
        {"sampling.temperature": "is -1", "sampling.top_p": "is 3", "output.n": "is 0", "priority": "is -500"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_field(name: str) -> None:
    sent, fields = CASES[name]

    async def test() -> None:
        async with rig(limits=EdgeLimits()) as it, neighbour(it):
            said = await refused(it.generate(sent))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert set(said.fields) == set(fields)
            for field, part in fields.items():
                assert part in said.fields[field], said.fields[field]
                assert field in said.message
            assert said.reason in ("INVALID_REQUEST", "CONTEXT_OVERFLOW")
            inside = await refused(it.stub.Complete(pb.CompleteRequest(request=sent)))
            assert inside.code is grpc.StatusCode.INVALID_ARGUMENT
            assert set(inside.fields) == {f"request.{field}" for field in fields}

    run(test())


def test_a_thousand_bad_ids_fit_into_one_status() -> None:
    async def test() -> None:
        async with rig() as it:
            sent = request(
                token_ids=pb.TokenIds(ids=[10**6] * 5000),
                stop=pb.StopParams(token_ids=[10**6] * 5000, strings=["x" * 300] * 1000),
                sampling=pb.SamplingParams(
                    temperature=9, top_p=9, min_p=9, top_k=-9, logit_bias={10**6 + i: math.inf for i in range(2000)}
                ),
                output=pb.OutputParams(n=-9, logprobs=-9, prompt_logprobs=-9),
                priority=-999,
            )
            said = await refused(it.generate(sent))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert {"token_ids.ids[0]", "stop.strings", "stop.token_ids", "sampling.logit_bias"} <= set(said.fields)
            assert "of 4998 more like it" in said.fields["token_ids.ids[4999]"]

    run(test())


@pytest.mark.parametrize(
    ("value", "shown"), [(2**31, -(2**31)), (2**63, 0), (2**64 - 1, -1)], ids=["2^31", "2^63", "2^64-1"]
)
def test_max_tokens_beyond_int32_by_hand(value: int, shown: int) -> None:
    """A parser of int32 keeps the low 32 bits, by the protobuf specification; what is left is judged like any."""
    stop = b"\x08" + varint(value)
    data = pb.GenerateRequest(text="abc").SerializeToString() + b"\x2a" + varint(len(stop)) + stop

    async def test() -> None:
        async with rig() as it, neighbour(it):
            said = await refused(it.raw(data))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert said.fields == {"stop.max_tokens": f"must be at least 1, is {shown}"}

    run(test())


def test_invalid_utf8_names_its_field() -> None:
    stop = b"\x1a\x01a" + b"\x1a\x02\xc3\x28"
    bodies = {
        "text": b"\x12\x04ab\xff\xfe",
        "stop.strings[1]": b"\x12\x03abc\x2a" + varint(len(stop)) + stop,
        "request_id": b"\x12\x03abc\x42\x01\x80",
        "model": b"\x0a\x02\xed\xa0",
    }

    async def test() -> None:
        async with rig() as it, neighbour(it):
            for field, data in bodies.items():
                said = await refused(it.raw(data))
                assert (said.code, list(said.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
                assert "UTF-8" in said.fields[field]

    run(test())


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 20, b"\x12\xff\xff\xff\xff\x0f", b"\x22\x05\x09\x00", b"\x07", b"\x00\x01", b"\x22" * 3],
    ids=lambda data: data.hex(),
)
def test_malformed_protobuf(data: bytes) -> None:
    async def test() -> None:
        async with rig() as it, neighbour(it):
            said = await refused(it.raw(data))
            assert said.code is grpc.StatusCode.INVALID_ARGUMENT
            assert next(iter(said.fields.values())).startswith("is cut off or malformed")
            for method in ("Complete", "Tokenize", "Chat"):
                said = await refused(it.raw(data, f"/moestro.v1.InferenceService/{method}"))
                assert said.code is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_oversized_protobuf() -> None:
    async def test() -> None:
        async with rig(limits=EdgeLimits(max_message_bytes=100_000)) as it, neighbour(it):
            for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
                said = await refused(it.generate(request(text="x" * 200_000), compression=compression))
                assert said.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "larger than max" in said.message

    run(test())


def test_unknown_model() -> None:
    async def test() -> None:
        async with rig() as it, neighbour(it):
            calls = (
                it.generate(request(model="nope")),
                it.stub.Tokenize(pb.TokenizeRequest(model="nope", text="a")),
                it.stub.Detokenize(pb.DetokenizeRequest(model="nope")),
            )
            for call in calls:
                said = await refused(call)
                assert (said.code, said.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
                assert said.message == "model 'nope' is not served here; served: fake"

    run(test())


def test_chat_refusals() -> None:
    async def test() -> None:
        async with rig() as it, neighbour(it):
            for messages, field in (
                ([], "messages"),
                ([("", "hi")], "messages[0].role"),
                ([("wizard", "")], "messages"),
            ):
                sent = pb.ChatRequest(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages])
                call = it.stub.Chat(sent)
                said = await refused(call.read())
                assert (said.code, list(said.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])

    run(test())


def test_detokenize_refuses_unknown_ids() -> None:
    async def test() -> None:
        async with rig() as it:
            said = await refused(it.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, VOCAB_SIZE])))
            assert list(said.fields) == ["token_ids[1]"]

    run(test())


def test_request_id_of_an_open_request() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.01)) as it:
            call = aiter(it.stub.Generate(request(request_id="mine", stop=pb.StopParams(max_tokens=50))))
            await anext(call)
            said = await refused(it.generate(request(request_id="mine")))
            assert list(said.fields) == ["request_id"]
            assert said.request_id == "mine"
            assert len([r async for r in call]) == 49
            assert await it.generate(request(request_id="mine"))

    run(test())


@pytest.mark.parametrize("timeout", ["1n", "0n", "0S"])
def test_deadline_already_past(timeout: str) -> None:
    """By hand-made headers, since a client library does not even send such a call."""

    async def test() -> None:
        async with rig() as it, neighbour(it):
            started = it.backend.num_started
            headers = {
                ":method": "POST",
                ":scheme": "http",
                ":path": GENERATE,
                ":authority": "localhost",
                "te": "trailers",
                "content-type": "application/grpc",
                "grpc-timeout": timeout,
            }
            answer = await raw_http2(it.port, headers, request().SerializeToString())
            assert b"grpc-status" in answer or answer[-13 + 3 : -13 + 4] == b"\x03", answer
            if timeout != "1n":  # which gRPC rounds up to a moment that may not have passed yet
                assert it.backend.num_started == started, "nothing is admitted"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await it.generate(request(), timeout=-1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(test())


def test_deadline_passes_mid_stream() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.02)) as it:
            call = it.stub.Generate(request(stop=pb.StopParams(max_tokens=200)), timeout=0.3)
            count = 0

            async def read() -> None:
                nonlocal count
                async for _ in call:
                    count += 1

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert 1 <= count < 200
            await it.settled()
            assert len(it.backend.cancelled) == 1

    run(test())


@pytest.mark.parametrize("how", ["cancel", "drop the connection"])
def test_client_gone_mid_stream(how: str) -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.005)) as it, neighbour(it):
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{it.port}", options=[("grpc.use_local_subchannel_pool", 1)])
            call = channel.unary_stream(GENERATE)(
                request(output=pb.OutputParams(n=3), stop=pb.StopParams(max_tokens=250)).SerializeToString()
            )
            await call.read()
            assert len(it.backend.open_sequences) == 4
            if how == "cancel":
                call.cancel()
            await channel.close()
            for _ in range(100):
                if len(it.backend.open_sequences) == 1:
                    break
                await asyncio.sleep(0.005)
            assert len(it.backend.cancelled) == 3

    run(test())


def test_500_connections_at_once() -> None:
    async def one(it: Rig, i: int) -> list[int]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{it.port}", options=options) as channel:
            data = request(text=chr(65 + i % 26)).SerializeToString()
            call = channel.unary_stream(GENERATE)(data, wait_for_ready=True)
            events = [pb.GenerateResponse.FromString(r).event async for r in call]
            return [t for e in events for d in e.deltas for t in d.token_ids]

    async def test() -> None:
        async with rig() as it, neighbour(it):
            answers = await asyncio.gather(*(one(it, i) for i in range(500)))
            assert answers == [expected_tokens(chr(65 + i % 26), 5, 4) for i in range(500)]

    run(test())


def test_more_requests_than_the_bound_are_refused_with_retry_info() -> None:
    async def test() -> None:
        backend = StubBackend(LIMITS, step_s=0.01)
        async with rig(backend, EdgeLimits(max_open_requests=8)) as it:
            sent = request(stop=pb.StopParams(max_tokens=30))
            results = await asyncio.gather(*(it.generate(sent) for _ in range(20)), return_exceptions=True)
            served = [r for r in results if isinstance(r, list)]
            assert len(served) == 8
            assert all(len(events) == 30 for events in served)
            for error in results:
                if isinstance(error, grpc.aio.AioRpcError):
                    said = await refused(_raise(error))
                    assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
                    assert said.retry_s == 1.0

    run(test())


def test_two_servers_on_one_port() -> None:
    async def test() -> None:
        async with rig() as it, neighbour(it):
            second = GrpcServer(it.core, StubCluster(), "second", GrpcOptions(host="127.0.0.1", port=it.port))
            with pytest.raises(ConfigError, match=rf"port: cannot listen on 127.0.0.1:{it.port}"):
                await second.start()
            await second.stop(0)

    run(test())


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


async def _raise(error: Exception) -> None:
    raise error
