"""The Python client, sync and async, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.edge.fakes import LIMITS, VOCAB_SIZE, served
from tests.edge.serving import rig, run

from moestro.cluster.client import AsyncClient, Client
from moestro.cluster.client_attempts import error_from
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.events import Completion, FinishReason, StreamEvent, gather
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import EdgeLimits
from moestro.cluster.edge.stub import StubBackend, StubCluster
from moestro.protos.errors import (
    ContextOverflow,
    InvalidRequest,
    MoestroError,
    Overloaded,
    SequenceFailed,
    Unavailable,
    UnknownModel,
)

SOURCE = Path(__file__).parents[2] / "src"


@contextlib.contextmanager
def serving(backend: StubBackend, limits: EdgeLimits | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """A server on a loop in another thread, for the sync client; also what checks that nothing has leaked."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def on_loop(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    async def start() -> tuple[RequestCore, GrpcServer]:
        core = RequestCore([served(backend)], limits)
        server = GrpcServer(core, StubCluster(), "test", GrpcOptions(host="127.0.0.1", port=0))
        await server.start()
        return core, server

    async def settled() -> None:
        for _ in range(200):
            if not backend.open_sequences and not core.num_open:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"leaked: {backend.open_sequences}, {core.num_open} requests open")

    core, server = on_loop(start())
    try:
        yield f"127.0.0.1:{server.port}", lambda: on_loop(settled())
        on_loop(settled())
    finally:
        on_loop(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, moestro.cluster.client; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == "[]"


def test_sync_client() -> None:
    with serving(StubBackend(LIMITS)) as (address, _), Client(address) as client:
        whole = client.generate("abc", max_tokens=5, seed=7, n=2, logprobs=1, stop=["never"])
        assert isinstance(whole, Completion)
        assert [len(c.token_ids) for c in whole.choices] == [5, 5]
        assert (whole.seed, whole.model, whole.finish_reason) == (7, "fake", FinishReason.LENGTH)
        assert len(whole.choices[1].logprobs) == 5
        events = list(
            client.stream("abc", max_tokens=5, seed=7, n=2, logprobs=1, stop="never", request_id=whole.request_id)
        )
        assert all(isinstance(event, StreamEvent) for event in events)
        streamed = gather(events)
        assert (streamed.choices, streamed.usage.output_tokens) == (whole.choices, 10)
        ids = client.tokenize("abc")
        assert client.generate(ids, max_tokens=5, seed=7).text == whole.text
        assert client.detokenize(ids) == "abc"
        assert client.chat("hi", max_tokens=3).usage.output_tokens == 3
        said = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
        assert sum(len(e.deltas[0].token_ids) for e in client.stream_chat(said, max_tokens=3)) == 3
        assert client.models()[0].vocab_size == VOCAB_SIZE
        assert client.info().version == "test"
        assert client.status().groups[0].name == "g0"


def test_async_client_agrees_with_the_sync_one() -> None:
    async def asked(address: str) -> tuple[Completion, list[str], list[int], str]:
        async with AsyncClient(address) as client:
            whole = await client.generate("abc", max_tokens=5, seed=7)
            texts = [event.text async for event in client.stream("abc", max_tokens=5, seed=7)]
            assert (await client.chat("hi", max_tokens=2)).usage.output_tokens == 2
            assert (await client.models())[0].name == "fake"
            assert (await client.info()).version == "test"
            assert (await client.status()).groups[0].dp == 1
            return whole, texts, await client.tokenize("abc"), await client.detokenize([65])

    with serving(StubBackend(LIMITS)) as (address, _):
        whole, texts, ids, text = asyncio.run(asked(address))
        with Client(address) as client:
            assert client.generate("abc", max_tokens=5, seed=7).choices == whole.choices
            assert ("".join(texts), ids, text) == (whole.text, client.tokenize("abc"), "a")


def test_errors_come_back_as_they_were_raised() -> None:
    with serving(StubBackend(LIMITS)) as (address, _), Client(address) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.generate("abc", temperature=math.nan, n=0)
        assert [v.field for v in caught.value.violations] == ["sampling.temperature", "output.n"]
        with pytest.raises(InvalidRequest) as caught:
            next(client.stream("", top_p=2))
        assert [v.field for v in caught.value.violations] == ["text", "sampling.top_p"]
        with pytest.raises(ContextOverflow):
            client.generate("x" * 1000)
        with pytest.raises(UnknownModel) as unknown:
            client.generate("x", model="nope")
        assert (unknown.value.name, unknown.value.served) == ("nope", ("fake",))
        with pytest.raises(InvalidRequest, match="larger than max"):
            client.tokenize("x" * (5 << 20))
    with (
        serving(StubBackend(LIMITS, fail_at=1)) as (address, _),
        Client(address) as client,
        pytest.raises(SequenceFailed),
    ):
        client.generate("abc")
    with serving(StubBackend(LIMITS), EdgeLimits(max_open_requests=0)) as (address, _), Client(address) as client:
        with pytest.raises(Overloaded) as over:
            client.generate("abc")
        assert over.value.retry_after_s == 1.0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 2**31}, "stop.max_tokens"),
        ({"seed": -1}, "sampling.seed"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"stop": [1]}, "stop.strings"),
        ({"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
    ],
)
def test_what_no_field_can_hold_is_refused_before_it_is_sent(options: Any, field: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        client.generate("abc", **options)
    assert [v.field for v in caught.value.violations] == [field]


def test_an_unknown_option_and_a_bad_prompt() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="unknown option 'max_token'"):
            client.generate("abc", max_token=3)  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest, match="text"):
            client.generate("\ud800")
        with pytest.raises(InvalidRequest, match="token_ids"):
            client.generate([-1])


def test_leaving_a_stream_cancels_it() -> None:
    with serving(StubBackend(LIMITS, step_s=0.005)) as (address, settled), Client(address) as client:
        for _ in client.stream("abc", max_tokens=200):
            break
        settled()


def test_deadlines() -> None:
    with serving(StubBackend(LIMITS, step_s=0.02)) as (address, _), Client(address, timeout_s=0.2) as client:
        with pytest.raises(TimeoutError):
            client.generate("abc", max_tokens=200)
        with pytest.raises(TimeoutError):
            list(client.stream("abc", max_tokens=200))
        assert client.generate("abc", max_tokens=20, timeout_s=10).usage.output_tokens == 20


class Flaky(StubBackend):
    """Lost for the first few starts."""

    def __init__(self, failures: int) -> None:
        super().__init__(LIMITS)
        self.failures = failures

    def start(self, sequences: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise Unavailable("not yet", retry_after_s=0.02)
        return super().start(sequences)


def test_unavailable_is_tried_again_as_often_as_allowed() -> None:
    with serving(Flaky(2)) as (address, _), Client(address) as client:
        assert client.generate("abc", max_tokens=2).usage.output_tokens == 2
    with serving(Flaky(2)) as (address, _), Client(address) as client:
        assert len(list(client.stream("abc", max_tokens=2))) == 2
    with serving(Flaky(3)) as (address, _), Client(address) as client, pytest.raises(Unavailable, match="not yet"):
        client.generate("abc")
    with serving(Flaky(1)) as (address, _), Client(address, retries=0) as client, pytest.raises(Unavailable):
        client.generate("abc")


def test_a_stream_that_has_begun_is_resumed_only_so_long() -> None:
    async def test() -> None:
        async with (
            rig(StubBackend(LIMITS, step_s=0.01)) as it,
            AsyncClient(f"127.0.0.1:{it.port}", retries=0, resume_s=1.2) as client,
        ):
            events = client.stream("abc", max_tokens=200)
            await anext(events)
            it.backend.lose()  # its refusals ask for a second each

            async def read() -> None:
                async for _ in events:
                    pass

            began_s = time.monotonic()
            with pytest.raises(Unavailable):
                await read()
            assert 1.0 <= time.monotonic() - began_s < 10

    run(test())


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1", retries=0) as client, pytest.raises(Unavailable):
        client.info()


def test_foreign_statuses() -> None:
    with serving(StubBackend(LIMITS)) as (address, _), grpc.insecure_channel(address) as channel:
        method: Any = channel.unary_unary("/moestro.v1.InferenceService/Nope")  # type: ignore[call-arg]
        with pytest.raises(grpc.RpcError) as caught:
            method(b"")
        error = error_from(caught.value)
        assert type(error) is MoestroError
        assert "UNIMPLEMENTED" in str(error)
