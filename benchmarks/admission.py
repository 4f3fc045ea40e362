"""What admission costs a gateway that is not overloaded: with it and without, the same requests in turn.

    python -m benchmarks.admission

Two servers over the stub (``benchmarks/gateway.py``), each in a process of its own; in one every request gets its
permit unasked and nobody looks for clients that do not read. Compared is the servers' processor time per request of
``TOKENS`` tokens. Short requests are the worst case: the cost is per request. Since two servers differ by more than
what is looked for when others use this machine, the same work is timed by itself too: ``alone`` is its share of the
request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from benchmarks.gateway import make_tokenizer, served_model
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.cluster.backend import Capacity
from moestro.cluster.delta_streams import QueuedDeltas
from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.permits import Permit, Permits
from moestro.cluster.edge.slow_consumers import Reader, SlowConsumers
from moestro.cluster.edge.stub import StubCluster
from moestro.cluster.edge.tickets import AdmissionLimits, Ask
from moestro.protos.gen import inference_pb2 as pb

TOKENS = 64
CLIENTS = 16
REQUESTS = 40  # of each client in a round


class FreePermit(Permit):
    def __init__(self) -> None:
        pass

    queued_s = 0.0

    def give_back(self, *, first_s: float | None = None, written: int = 0, finished: bool = False) -> None:
        pass


class FreePermits(Permits):
    """Everybody may start."""

    def check(self, client: str, deadline_s: float) -> None:
        pass

    async def take(self, ask: Ask) -> Permit:
        return FreePermit()


@contextlib.contextmanager
def nobody_looks(self: SlowConsumers, stream: Any) -> Iterator[Reader]:
    yield Reader(stream, None)  # type: ignore[arg-type]


def serve(pipe: Connection, folder: Path, has_admission: bool) -> None:
    """Sends its port, then its processor seconds whenever asked; until None comes."""

    async def run() -> None:
        core = RequestCore([served_model(folder, 1024)])
        if not has_admission:
            limits = Admission(core.limits.admission)
            core.permits = {name: FreePermits(limits, each.backend.capacity) for name, each in core.models.items()}
            SlowConsumers.watch = nobody_looks  # type: ignore[method-assign]
        server = GrpcServer(core, StubCluster(), "bench", GrpcOptions(host="127.0.0.1", port=0))
        pipe.send(await server.start())
        while await asyncio.to_thread(pipe.recv) is not None:
            pipe.send(time.process_time())
        await server.stop(0)

    asyncio.run(run())


async def ask_all(port: int) -> None:
    """Raises when a token is missing."""
    request = pb.GenerateRequest(
        text="def f(", sampling=pb.SamplingParams(seed=1), stop=pb.StopParams(max_tokens=TOKENS, ignore_eos=True)
    ).SerializeToString()

    async def client() -> None:
        channel: Any
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            for _ in range(REQUESTS):
                call = channel.unary_stream("/moestro.v1.InferenceService/Generate")(request)
                if (count := len([message async for message in call])) != TOKENS:
                    raise RuntimeError(f"{count} of {TOKENS} messages")

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def alone(count: int = 2000) -> float:
    """Microseconds of processor time that a request spends on admission and on being watched."""
    capacity = Capacity(10**6, 10**9)
    permits = Permits(Admission(AdmissionLimits()), lambda: capacity)
    slow = SlowConsumers(30.0, 4096)
    deltas = QueuedDeltas(lambda _: None, {})
    start_s = time.thread_time()
    for _ in range(count):
        permits.check("client", inf)
        permit = await permits.take(Ask("client", 20, TOKENS))
        with slow.watch(deltas) as reader:
            for number in range(TOKENS):
                reader.writing = number
                reader.writing = None
        permit.give_back(first_s=1.0, written=TOKENS, finished=True)
    return 1e6 * (time.thread_time() - start_s) / count


def one_round(port: int, pipe: Connection) -> float:
    """The server's microseconds of processor time per request."""
    pipe.send("cpu")
    before = pipe.recv()
    asyncio.run(ask_all(port))
    pipe.send("cpu")
    return 1e6 * float(pipe.recv() - before) / (CLIENTS * REQUESTS)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/admission.json"),
) -> None:
    """Measures, prints and writes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch))
        sides = []
        for has_admission in (True, False):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, Path(scratch), has_admission), daemon=True)
            process.start()
            sides.append((here.recv(), here))
        rows = []
        for number in range(rounds + 1):
            order = sides if number % 2 else sides[::-1]
            taken = {port: one_round(port, pipe) for port, pipe in order}
            with_it, without = (taken[port] for port, _ in sides)
            if number:
                alone_us = asyncio.run(alone())
                row = {"with_us": with_it, "without_us": without, "ratio": with_it / without, "alone_us": alone_us}
                rows.append(row | {"alone": alone_us / without})
        for _, pipe in sides:
            pipe.send(None)
    results = spread(rows)
    table = Table("processor time a request", "median", "range", title=f"{TOKENS} tokens a request, {rounds} rounds")
    for name, figure in results.items():
        table.add_row(name, f"{figure['median']:.4g}", f"{figure['min']:.4g} to {figure['max']:.4g}")
    Console().print(table)
    settings = {"rounds": rounds, "tokens": TOKENS, "clients": CLIENTS, "requests": REQUESTS, "cores": os.cpu_count()}
    report = {"hardware": hardware_record(), "settings": settings, "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
