"""Two ranks of one thread against one rank of two threads, on the same two cores.

    python -m benchmarks.two_ranks [--models tiny,mid] [--rounds 7] [--batch 16]

The group of two (EP=2, DP=2) shares out requests and experts; the rank alone has all of both and OpenMP's own wait
policy, as suits an engine that has its cores to itself. All are real ranks (scheduler, lockstep, model) in processes of
their own and take turns round by round, so that a machine with other work distorts the ratio little. A round is one
batch of random prompts; decoding counts from when every sequence has its first token.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Kind:
    """How the cores are used."""

    ranks: int
    threads: int  # of a rank
    transport: str | None  # None: by call


KINDS = {
    "one rank": Kind(1, 2, None),
    "two ranks": Kind(2, 1, None),
    "two ranks, gloo": Kind(2, 1, "gather_scatter"),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank is to do in a round."""

    prompts: list[list[int]]
    num_output: int


@dataclass(frozen=True, slots=True)
class Moments:
    """Of one rank, on the machine's clock: when it began, when all of its sequences had a token, when all had ended.
    Of one layer, in the mean: seconds the host waited for rows, and computed experts."""

    begun: float
    first: float
    ended: float
    wait_s: float
    compute_s: float


class Ranks:
    """Processes of one kind; a context manager."""

    def __init__(self, kind: Kind, model: str) -> None:
        from moestro.router.mesh import serve_store

        self._store, address = serve_store()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(kind.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, kind, model, rank, address), daemon=True)
            process.start()
            theirs.close()  # so that the end of a rank is the end of its pipe
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()

    def run(self, prompts: list[list[int]], num_output: int) -> dict[str, float]:
        """One round's figures: the prompts dealt out, from the first rank's beginning to the last's end."""
        size = len(self._pipes)
        for rank, pipe in enumerate(self._pipes):
            pipe.send(Batch(prompts[rank::size], num_output))
        all_moments: list[Moments] = [pipe.recv() for pipe in self._pipes]
        begun = min(moments.begun for moments in all_moments)
        first, ended = (max(getattr(moments, name) for moments in all_moments) for name in ("first", "ended"))
        return {
            "decode": len(prompts) * (num_output - 1) / (ended - first),
            "prefill": sum(map(len, prompts)) / (first - begun),
            "wait_us": 1e6 * max(moments.wait_s for moments in all_moments),
            "compute_us": 1e6 * max(moments.compute_s for moments in all_moments),
        }


def _rank(pipe: Connection, kind: Kind, model: str, rank: int, address: Any) -> None:
    import os

    if kind.ranks > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from moestro.router.parallel import GroupShape
    from moestro.router.rebalance.config import Config
    from moestro.workers.full_group import GroupPlace, build_rank
    from moestro.workers.rank_setup import RankSpec
    from moestro.workers.rebalancing.setup import ExpertsSpec

    experts = ExpertsSpec(rebalance=Config(enabled=False), transport=kind.transport)  # type: ignore[arg-type]
    spec = RankSpec(model, threads=kind.threads, shape=GroupShape(kind.ranks), max_context=1024, experts=experts)
    built = build_rank(spec, GroupPlace(rank, 0, address))
    clients = _Clients(built.loop)
    thread = threading.Thread(target=built.loop.run, args=(clients.publish,))
    thread.start()
    pipe.send("ready")
    while (batch := pipe.recv()) is not None:
        pipe.send(clients.run(batch))
    built.loop.stop()
    thread.join()


class _Clients:
    """Hands a batch to a rank and notes when its tokens come."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._count = 0
        self._silent: set[str] = set()
        self._open: set[str] = set()
        self._first = 0.0
        self._done = threading.Event()

    def run(self, batch: Batch) -> Moments:
        from moestro.protos import wire
        from moestro.protos.gen import rank_pb2 as pb
        from moestro.protos.sequences import SamplingParams, SequenceRequest

        sampling = SamplingParams(temperature=0.0, max_tokens=batch.num_output, ignore_eos=True)
        requests = [SequenceRequest(f"{self._count + i}", tuple(p), sampling) for i, p in enumerate(batch.prompts)]
        self._count += len(requests)
        self._silent, self._open = ({request.sequence_id for request in requests} for _ in range(2))
        self._done.clear()
        before = self._seconds()
        begun = time.monotonic()
        for request in requests:
            self._loop.submit(pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString())
        self._done.wait()
        ended = time.monotonic()
        wait_s, compute_s = (now - then for now, then in zip(self._seconds(), before, strict=True))
        calls = len(self._banks()) * batch.num_output  # steps of the prompts are few beside the decodes
        return Moments(begun, self._first, ended, wait_s / calls, compute_s / calls)

    def publish(self, output: Any) -> None:
        for delta in output.deltas:
            if delta.token_ids and delta.sequence_id in self._silent:
                self._silent.discard(delta.sequence_id)
                self._first = time.monotonic()
            if delta.finish_reason is not None:
                self._open.discard(delta.sequence_id)
        if not self._open:
            self._done.set()

    def _banks(self) -> list[Any]:
        layers = self._loop.model.layers
        return [layer.mlp.bank for layer in layers if hasattr(layer.mlp, "bank")]

    def _seconds(self) -> tuple[float, float]:
        banks = self._banks()
        return sum(bank.wait_s for bank in banks), sum(bank.compute_s for bank in banks)


def measure(model: str, batch: int, prompt: int, num_output: int, rounds: int, seed: int, kinds: list[str]) -> Any:
    """Median and range over rounds, by kind, with the ratio to one rank."""
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    groups = {kind: Ranks(KINDS[kind], model) for kind in kinds}
    vocabulary = SHAPES["tiny"]["vocab_size"]
    for number in range(-1, rounds):  # round -1 warms up and is not counted
        rng = random.Random(f"{seed} {number}")
        prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)]
        row = {kind: group.run(prompts, num_output) for kind, group in groups.items()}
        for kind, figures in row.items():
            figures["ratio"] = figures["decode"] / row["one rank"]["decode"]
            figures["prefill_ratio"] = figures["prefill"] / row["one rank"]["prefill"]
            rows[kind] += [figures] if number >= 0 else []
    for group in groups.values():
        group.__exit__()
    return {kind: spread(some) for kind, some in rows.items()}


def main(
    models: Annotated[str, typer.Option(help="Comma-separated names of benchmarks.checkpoints.")] = "tiny,mid",
    batch: Annotated[int, typer.Option(min=2)] = 16,
    prompt: Annotated[int, typer.Option(min=1)] = 128,
    num_output: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    gloo: Annotated[bool, typer.Option(help="Also two ranks whose rows go by gloo.")] = True,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path(".cache/checkpoints"),
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/two_ranks.json"),
) -> None:
    """Measures, prints a table, writes JSON."""
    kinds = [kind for kind in KINDS if gloo or KINDS[kind].transport is None]
    results: dict[str, Any] = {}
    columns = ("decode", "ratio", "prefill_ratio", "wait_us", "compute_us")
    table = Table(
        "model", "", *columns, title=f"batch {batch}: decode tok/s, ratio to one rank, wait and experts a layer"
    )
    for name in models.split(","):
        model = str(checkpoint(name, folder, seed))
        results[name] = measure(model, batch, prompt, num_output, rounds, seed, kinds)
        for kind, figures in results[name].items():
            cells = []
            for column in columns:
                digits = 2 if column.endswith("ratio") else 0
                one = {key: f"{value:.{digits}f}" for key, value in figures[column].items()}
                cells.append(f"{one['median']} ({one['min']} to {one['max']})")
            table.add_row(name, kind, *cells)
    Console(width=150).print(table)
    settings = {"batch": batch, "prompt": prompt, "num_output": num_output, "rounds": rounds, "seed": seed}
    record = {"benchmark": "two_ranks", "hardware": hardware_record(), "settings": settings, "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
