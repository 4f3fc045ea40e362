"""Tokens per second that one gateway core streams to many clients, with a stub instead of an engine.

The server runs in a process of its own, pinned to one core; the clients in another process, pinned to the other cores.
One token is one delta is one gRPC message, and every client reads as fast as it gets. Text goes through the real
incremental detokenizer, of ``--model`` or of a small tokenizer made for the purpose, and is looked through for a stop
string. ``first_token_p50_s`` is that of all clients connecting and asking at one moment, connection included.

    python benchmarks/gateway.py --rounds 7 --out benchmarks/results/gateway.json
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from moestro.cluster.bench.hardware import hardware_record
from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.served import ServedModel
from moestro.cluster.edge.stub import StubBackend, StubCluster
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLimits

VOCAB_SIZE = 512


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer, trained on this file, for when no checkpoint is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def served_model(folder: Path, max_context: int) -> ServedModel:
    """A checkpoint's text side over a stub backend."""
    text = TextModel.load(folder)
    limits = EngineLimits(vocab_size=text.vocab_size, max_context=max_context, max_waiting=4096)
    return ServedModel(text, StubBackend(limits), lambda prompt, stops: TextStream(text, prompt, stops))


def serve(ready: Connection, folder: Path, max_context: int, cores: list[int]) -> None:
    """The server process. Sends its port, then its CPU seconds whenever asked, until told to stop."""
    os.sched_setaffinity(0, cores)

    async def run() -> None:
        core = RequestCore([served_model(folder, max_context)])
        server = GrpcServer(core, StubCluster(), "bench", GrpcOptions(host="127.0.0.1", port=0))
        ready.send(await server.start())
        while await asyncio.to_thread(ready.recv) == "cpu":
            ready.send(time.process_time())
        await server.stop(0)

    asyncio.run(run())


async def one_round(port: int, clients: int, tokens: int) -> dict[str, float]:
    """Every client on a connection of its own, all at once. Raises when a client misses a token."""
    request = pb.GenerateRequest(
        text="def f(",
        stop=pb.StopParams(max_tokens=tokens, ignore_eos=True, strings=["never in the text"]),
        sampling=pb.SamplingParams(seed=1),
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
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder whose tokenizer is used.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("benchmarks/results/gateway.json"),
) -> None:
    """Measures, prints and writes."""
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    server_cores, client_cores = cores[:1], cores[1:] or cores
    here, there = context.Pipe()
    scratch = tempfile.TemporaryDirectory()
    folder = model or Path(scratch.name)
    if model is None:
        make_tokenizer(folder)
    server = context.Process(target=serve, args=(there, folder, tokens + 64, server_cores), daemon=True)
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
    scratch.cleanup()
    report: dict[str, Any] = {
        "benchmark": "gateway",
        "clients": clients,
        "tokens_per_client": tokens,
        "text": f"tokenizer of {model.name}" if model else f"byte-level BPE of {VOCAB_SIZE} tokens",
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
        "hardware": hardware_record(),
    }
    median = report["tokens_per_s"]["median"]
    print(f"{clients} clients on one server core: median {median:,.0f} tokens/s over {rounds} rounds")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
