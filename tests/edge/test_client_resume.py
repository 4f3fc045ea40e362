"""The Python client goes on with what was cut off, here or at another gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tests.edge.fakes import LIMITS, served
from tests.edge.serving import rig, run

from moestro.cluster.client import AsyncClient, Client
from moestro.cluster.client_attempts import Attempts, Route, addresses_of, error_from
from moestro.cluster.client_progress import Progress
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.events import ChoiceDelta, FinishReason, StreamEvent, Usage, gather
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.stub import StubBackend, StubCluster
from moestro.protos.errors import MoestroError, Overloaded, Unavailable
from moestro.protos.gen import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
STEP_S = 0.004


class Gateway:
    """A process, with its stub."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge.stub_gateway", str(STEP_S)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def address(self) -> str:
        assert self.process.stdout is not None
        return f"127.0.0.1:{int(self.process.stdout.readline())}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def gateways(count: int) -> Iterator[list[Gateway]]:
    started = [Gateway() for _ in range(count)]
    try:
        yield started
    finally:
        for gateway in started:
            gateway.kill()


def test_a_gateway_is_killed_in_mid_stream_and_the_client_goes_on_at_another() -> None:
    options = {"max_tokens": 100, "n": 2, "logprobs": 1, "prompt_logprobs": 0, "temperature": 0.7}
    with gateways(2) as (first, second):
        addresses = [first.address, second.address]
        with Client(addresses) as client, Client(addresses[1]) as other:
            events: list[StreamEvent] = []
            for event in client.stream("abc", stop="\x7f", **options):  # type: ignore[arg-type]
                events.append(event)
                if event.sequence_number == 30:
                    first.kill()
            got = gather(events)
            whole = other.generate("abc", request_id=got.request_id, **options)  # type: ignore[arg-type]
            assert (got.choices, got.seed, got.prompt_logprobs) == (whole.choices, whole.seed, whole.prompt_logprobs)
            assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_only_gateway_stops_and_comes_back() -> None:
    """What it had in memory is gone with it, so only what the client sends can tell the new one where it was."""

    async def serve(port: int) -> GrpcServer:
        core = RequestCore([served(StubBackend(LIMITS, STEP_S))])
        server = GrpcServer(core, StubCluster(), "test", GrpcOptions(host="127.0.0.1", port=port))
        await server.start()
        return server

    async def test() -> None:
        server = await serve(0)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            events = client.stream("abc", max_tokens=100, request_id="mine")
            begun = [await anext(events), await anext(events)]
            await server.stop(0)
            await asyncio.sleep(0.3)
            server = await serve(server.port)
            got = gather([*begun, *[event async for event in events]])
            assert got.usage.output_tokens == 100
            assert (await client.generate("abc", max_tokens=100, request_id="mine")).choices == got.choices
            await server.stop(0)

    run(test())


class Severed:
    """A proxy that cuts its connections; the server behind may not notice soon."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self, port: int = 0) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        self.cut()
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        await asyncio.gather(self._pump(reader, here), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()

    def cut(self) -> None:
        """Towards the client only: the server's side stays open."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


def test_a_connection_is_cut_again_and_again_and_the_server_has_not_noticed() -> None:
    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.004)) as it:
            proxy = Severed(it.port)
            port = await proxy.start()
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                events = []
                async for event in client.stream("abc", max_tokens=150, n=2):
                    events.append(event)
                    if len(events) in (5, 40, 41):
                        proxy.cut()
            whole = await it.stub.Complete(
                pb.CompleteRequest(
                    request=pb.GenerateRequest(
                        text="abc",
                        request_id=events[0].request_id,
                        stop=pb.StopParams(max_tokens=150),
                        output=pb.OutputParams(n=2),
                    )
                )
            )
            got = gather(events)
            assert [choice.text for choice in got.choices] == [choice.text for choice in whole.choices]
            assert [list(choice.token_ids) for choice in got.choices] == [list(c.token_ids) for c in whole.choices]

    run(test())


def test_a_call_that_was_cut_off_before_its_first_token_is_not_given_up_soon() -> None:
    """Its gateway was there, so it will be again; one that never was is given up after ``retries``."""

    async def test() -> None:
        async with rig(StubBackend(LIMITS, step_s=0.3)) as it:
            proxy = Severed(it.port)
            port = await proxy.start()
            async with AsyncClient(f"127.0.0.1:{port}", retries=0) as client:
                asked = asyncio.ensure_future(client.generate("abc", max_tokens=2))
                while not it.backend.num_started:  # noqa: ASYNC110 - nothing here signals
                    await asyncio.sleep(0.01)
                proxy.stop()
                await asyncio.sleep(0.8)
                assert not asked.done()
                await proxy.start(port)
                assert (await asked).usage.output_tokens == 2
            proxy.stop()
            async with AsyncClient("127.0.0.1:1", retries=0) as client:
                with pytest.raises(Unavailable):
                    await client.generate("abc")

    run(test())


def test_leaving_and_closing_end_a_stream_for_good() -> None:
    with gateways(1) as (only,), Client(only.address) as client:
        events = client.stream("abc", max_tokens=200)
        next(events)
        threading.Timer(0.1, client.close).start()
        began_s = time.monotonic()
        with pytest.raises((MoestroError, ValueError)):
            list(events)
        assert time.monotonic() - began_s < 10


def event(number: int, *deltas: ChoiceDelta, usage: Usage | None = None) -> StreamEvent:
    return StreamEvent("mine", number, deltas, usage=usage)


def test_what_is_sent_to_go_on() -> None:
    progress = Progress(pb.GenerateRequest(text="abc", request_id="mine"))
    assert not pb.GenerateRequest.FromString(progress.data()).HasField("resume")
    assert pb.GenerateRequest.FromString(progress.data()).resume == pb.Resume(), "it may be open there still"
    progress.take(event(0, ChoiceDelta(1, "ab", (1, 2)), ChoiceDelta(0, "", (5,))))
    progress.take(event(1, ChoiceDelta(1, "c", (3,), finish_reason=FinishReason.LENGTH)))
    again = pb.GenerateRequest.FromString(progress.data())
    assert again == pb.GenerateRequest(
        text="abc",
        request_id="mine",
        resume=pb.Resume(
            last_sequence_number=1,
            choices=[
                pb.ResumedChoice(index=1, token_ids=[1, 2, 3], finish_reason=pb.FINISH_REASON_LENGTH),
                pb.ResumedChoice(index=0, token_ids=[5]),
            ],
        ),
    )
    assert pb.GenerateRequest.FromString(progress.data()) == again
    assert not progress.is_complete
    with pytest.raises(MoestroError, match="event 3 came where 2 was due"):
        progress.take(event(3, ChoiceDelta(0, "x", (6,))))
    progress.take(event(2, ChoiceDelta(0, "x", (6,)), usage=Usage()))
    assert progress.is_complete


def test_how_often_and_how_long() -> None:
    now_s = 100.0
    lost, full = Unavailable("lost", retry_after_s=0.2), Overloaded("full", retry_after_s=0.5)
    attempts = Attempts(2, 3.0, None, lambda: now_s)
    assert [attempts.pause_after(lost) for _ in range(2)] == [0.2, 0.2]
    with pytest.raises(Unavailable):
        attempts.pause_after(lost)
    attempts.arrived()
    assert [attempts.pause_after(full) for _ in range(5)] == [0.5, 0.5, 0.5, 0.8, 1.6]
    now_s = 101.5
    with pytest.raises(Overloaded):
        attempts.pause_after(full)
    attempts.arrived()
    assert attempts.pause_after(lost) == 0.2, "each cut has a time of its own"
    with pytest.raises(ValueError, match="other"):
        attempts.pause_after(ValueError("other"))
    with pytest.raises(Overloaded):
        Attempts(2, 3.0, None, lambda: now_s).pause_after(full)
    hurried = Attempts(2, 3.0, 0.1, lambda: now_s)
    assert hurried.remaining_s == pytest.approx(0.1)
    with pytest.raises(Unavailable):
        hurried.pause_after(lost)


def test_addresses() -> None:
    assert addresses_of("a:1, b:2,,a:1") == ("a:1", "b:2")
    assert addresses_of(["a:1"]) == ("a:1",)
    with pytest.raises(ValueError, match="no address"):
        addresses_of(" ,")
    route = Route(("a", "b"))
    route.failed("a")
    route.failed("a")
    assert route.address == "b"
    route.failed("b")
    assert route.address == "a"


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.CANCELLED, "CANCELLED", Unavailable),
        (grpc.StatusCode.UNKNOWN, "Stream removed", Unavailable),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", Unavailable),
        (grpc.StatusCode.UNKNOWN, "what?", MoestroError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Stream removed (Deadline Exceeded)", TimeoutError),
    ],
)
def test_what_grpc_itself_says(code: grpc.StatusCode, message: str, kind: type[Exception]) -> None:
    nothing = grpc.aio.Metadata()
    assert type(error_from(grpc.aio.AioRpcError(code, nothing, nothing, message))) is kind
