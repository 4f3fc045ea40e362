"""Tokens per second that one gateway core streams to many clients, with a stub instead of an engine.

The server runs in a process of its own, pinned to one core; the clients in another process, pinned to the other cores.
One token is one delta is one gRPC message, and every client reads as fast as it gets. Text goes through the real
incremental detokenizer when ``--model`` names a checkpoint folder, else through a byte-sized stand-in.

    python benchmarks/gateway.py --rounds 7 --out benchmarks/results/gateway.json
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import OpenText, ServedModel
from moestro.cluster.edge.stub import StubBackend
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLimits

VOCAB_SIZE = 256


@dataclass(frozen=True)
class NoDefaults:
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ByteText:
    """One Latin-1 character a token: the cheapest text there is, so that the edge itself is measured."""

    name: str = "stub"
    vocab_size: int = VOCAB_SIZE
    special_ids: frozenset[int] = frozenset()
    has_chat_template: bool = False
    generation: NoDefaults = NoDefaults()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % VOCAB_SIZE for character in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class ByteUpdate:
    text: str
    num_tokens_used: int
    stop_string: str | None = None


class ByteStream:
    stop_string: str | None = None

    def __init__(self, prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        del prompt_ids, stop_strings

    def push(self, token_ids: Sequence[int]) -> ByteUpdate:
        return ByteUpdate("".join(map(chr, token_ids)), len(token_ids))

    def finish(self) -> str:
        return ""


def served_model(folder: Path | None, max_context: int) -> ServedModel:
    """The checkpoint's text side, or the stand-in, over a stub backend."""
    if folder is None:
        text: Any = ByteText()
        open_text: OpenText = ByteStream
    else:
        from moestro.cluster.text.model import TextModel
        from moestro.cluster.text.stream import TextStream

        text = model = TextModel.load(folder)

        def open_text(prompt_ids: Sequence[int], stop_strings: Sequence[str]) -> TextStream:
            return TextStream(model, prompt_ids, stop_strings)

    limits = EngineLimits(vocab_size=text.vocab_size, max_context=max_context, max_waiting=4096)
    return ServedModel(text, StubBackend(limits), open_text)


def serve(ready: Connection, folder: Path | None, max_context: int, cores: list[int]) -> None:
    """The server process. Sends its port, then its CPU seconds whenever asked, until told to stop."""
    os.sched_setaffinity(0, cores)

    async def no_status() -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse()

    async def run() -> None:
        core = RequestCore([served_model(folder, max_context)])
        server = GrpcServer(core, no_status, "bench", GrpcOptions(host="127.0.0.1", port=0))
        ready.send(await server.start())
        while await asyncio.to_thread(ready.recv) == "cpu":
            ready.send(time.process_time())
        await server.stop(0)

    asyncio.run(run())


async def one_round(port: int, clients: int, tokens: int) -> dict[str, float]:
    """Every client on a connection of its own, all at once. Raises when a client misses a token."""
    request = pb.GenerateRequest(
        text="def f(", stop=pb.StopParams(max_tokens=tokens, ignore_eos=True), sampling=pb.SamplingParams(seed=1)
    ).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
    start_s = time.perf_counter()

    async def client(number: int) -> tuple[float, float]:
        """When its first and its last message came."""
        channel: Any
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            messages = aiter(channel.unary_stream("/moestro.v1.InferenceService/Generate")(request))
            data = await anext(messages)
            first_s, count = time.perf_counter(), 1
            async for message in messages:
                data, count = message, count + 1
            event = pb.GenerateResponse.FromString(data).event
            if count != tokens or event.sequence_number != tokens - 1 or event.usage.output_tokens != tokens:
                raise RuntimeError(f"client {number} got {count} of {tokens} messages")
            return first_s, time.perf_counter()

    times = await asyncio.gather(*(client(i) for i in range(clients)))
    return {
        "tokens_per_s": clients * tokens / (max(end_s for _, end_s in times) - start_s),
        "first_token_p50_s": statistics.median(first_s for first_s, _ in times) - start_s,
    }


def drive(out: Connection, port: int, clients: int, tokens: int, cores: list[int]) -> None:
    """The clients' process: one round."""
    os.sched_setaffinity(0, cores)
    out.send(asyncio.run(one_round(port, clients, tokens)))


def main(
    clients: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per stream.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds; one more runs first to warm up.")] = 7,
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder whose tokenizer writes the text.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures, prints and writes."""
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    server_cores, client_cores = cores[:1], cores[1:] or cores
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, model, tokens + 64, server_cores), daemon=True)
    server.start()
    port = here.recv()
    results = []
    for number in range(rounds + 1):
        near, far = context.Pipe()
        here.send("cpu")
        cpu_before = here.recv()
        driver = context.Process(target=drive, args=(far, port, clients, tokens, client_cores), daemon=True)
        driver.start()
        result = near.recv()
        driver.join()
        here.send("cpu")
        result["server_cpu_us_per_token"] = 1e6 * (here.recv() - cpu_before) / (clients * tokens)
        if number:
            results.append(result)
            print(f"round {number}: {result['tokens_per_s']:,.0f} tokens/s, {result['server_cpu_us_per_token']:.1f} µs")
    here.send("stop")
    server.join(10)
    report: dict[str, Any] = {
        "benchmark": "gateway",
        "clients": clients,
        "tokens_per_client": tokens,
        "text": "checkpoint" if model else "one character per token",
        "server_cores": len(server_cores),
        "client_cores": len(client_cores),
        "cores_shared": not cores[1:],
        **{
            key: {
                "median": statistics.median(r[key] for r in results),
                "min": min(r[key] for r in results),
                "max": max(r[key] for r in results),
            }
            for key in ("tokens_per_s", "first_token_p50_s", "server_cpu_us_per_token")
        },
        "rounds": rounds,
        "hardware": hardware(),
        "commit": commit(),
    }
    median = report["tokens_per_s"]["median"]
    print(f"{clients} clients on one server core: median {median:,.0f} tokens/s over {rounds} rounds")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


def hardware() -> dict[str, Any]:
    """What the figures hold for."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def commit() -> str:
    """The commit that was measured; ``+`` when there are changes besides."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if dirty else "")


if __name__ == "__main__":
    typer.run(main)
