"""What the cluster adds to the engine: time to start, time to the first token, memory.

    python -m benchmarks.cluster

Starts ``moestro serve`` several times and measures, from outside: seconds from the command to the first answered call;
time to first token through client, gateway and rank against the same engine called in this process, request by request
in turn, on one thread each; resident memory of the rank against its weights and KV pool.
"""

from __future__ import annotations

import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.cluster.client import Client
from moestro.demo.paths import MODEL_DIR
from moestro.protos.errors import MoestroError
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.engine import Engine
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

KV_BYTES = 128 * 2**20
PROMPT_TOKENS = 128
START_LIMIT_S = 120.0


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Servers started.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="First tokens measured on each side in a round.")] = 40,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/cluster.json"),
) -> None:
    """Start, first token and memory; median and range over rounds."""
    torch.set_num_threads(1)
    model = load_model(MODEL_DIR)
    weights = MODEL_DIR.joinpath("model.safetensors").stat().st_size
    spec = RankSpec(model=str(MODEL_DIR), threads=1, kv_bytes=KV_BYTES)
    engine = build_engine(spec, model, torch.device("cpu"))
    rows = []
    for number in range(rounds):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        prompts = torch.randint(256, 4000, (requests + 5, PROMPT_TOKENS), generator=generator).tolist()
        with serving() as (client, start_s):
            pairs = [(through_engine(engine, prompt), through_cluster(client, prompt)) for prompt in prompts][5:]
            resident = max(rank.resident_bytes for group in client.status().groups for rank in group.ranks)
        bare, whole = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
        rows.append(
            {
                "start_to_first_answer_s": start_s,
                "engine_first_token_ms": bare,
                "cluster_first_token_ms": whole,
                "added_first_token_ms": statistics.median(c - e for e, c in pairs) * 1e3,
                "rank_resident_mb": resident / 1e6,
                "rank_allowed_mb": (1.3 * (weights + KV_BYTES) + 600e6) / 1e6,
            }
        )
    results = spread(rows)
    table = Table("figure", "median", "range", title=f"demo model, dp 1, {requests} requests a round")
    for name, figure in results.items():
        table.add_row(name, f"{figure['median']:.2f}", f"{figure['min']:.2f} to {figure['max']:.2f}")
    Console().print(table)
    settings = {
        "rounds": rounds,
        "requests": requests,
        "prompt_tokens": PROMPT_TOKENS,
        "kv_bytes": KV_BYTES,
        "seed": seed,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"hardware": hardware_record(), "settings": settings, "results": results}, indent=2) + "\n"
    )


def through_engine(engine: Engine, prompt: list[int]) -> float:
    """Seconds to the first token of the engine alone."""
    start = time.perf_counter()
    engine.add(SequenceRequest("0", tuple(prompt), SamplingParams(temperature=0.0, max_tokens=1)), time.monotonic())
    while not any(delta.token_ids for delta in engine.step(time.monotonic)):
        pass
    return time.perf_counter() - start


def through_cluster(client: Client, prompt: list[int]) -> float:
    """Seconds to the first token as a client sees it."""
    start = time.perf_counter()
    stream = client.stream(prompt, temperature=0.0, max_tokens=1)
    while not any(delta.token_ids for delta in next(stream).deltas):
        pass
    elapsed = time.perf_counter() - start
    for _ in stream:
        pass
    return elapsed


@contextmanager
def serving() -> Iterator[tuple[Client, float]]:
    """A server on a free port, and the seconds from its start to its first answered call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "moestro.toml"
        config.write_text(f"[cluster]\ndp = 1\n[rank]\nthreads = 1\nkv_memory = {KV_BYTES}\n[server]\nport = {port}\n")
        log = open(Path(folder) / "log", "w+")  # noqa: SIM115 - closed below, after the server
        start = time.perf_counter()
        command = [sys.executable, "-m", "moestro.cluster.cli.main", "serve", "--config", str(config)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with Client(f"localhost:{port}", timeout_s=30.0, retries=0) as client:
                while True:
                    with suppress(MoestroError):
                        client.generate("import ", max_tokens=1)
                        break
                    if server.poll() is not None or time.perf_counter() - start > START_LIMIT_S:
                        log.seek(0)
                        raise RuntimeError(f"the server did not come up:\n{log.read()}")
                    time.sleep(0.05)
                yield client, time.perf_counter() - start
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
            log.close()


if __name__ == "__main__":
    typer.run(main)
