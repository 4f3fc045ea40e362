"""Groups of ranks as real processes on this machine, driven in phases, for benchmarks of a group without a cluster.

Each process runs one rank and keeps a number of requests in flight at it while a phase lasts.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

Prompts = Callable[[Any, random.Random], list[int]]


@dataclass(frozen=True, slots=True)
class Phase:
    """What every rank's clients send for ``seconds``, and how many requests each rank has in flight."""

    name: str
    seconds: float
    workload: Any  # given to the group's prompt function
    in_flight: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One rank's phase. Gaps are the seconds between the deltas of a sequence (ITL)."""

    tokens: int  # prompt and output, of sequences that ended
    seconds: float
    gaps: list[float]
    observing_s: float  # in counting, gathering and deciding, waits for the other ranks included
    steps_s: float


class Group:
    """A group of ``size`` rank processes. ``module:function`` names a Prompts function; use as a context manager."""

    def __init__(self, spec: dict[str, Any], rebalance: dict[str, Any], size: int, prompts: str, seed: int) -> None:
        """``spec`` and ``rebalance`` are fields of RankSpec and of the rebalancer's Config."""
        from moestro.router.mesh import serve_store

        self._store, address = serve_store()
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, spec, rebalance, size, rank, address.host, address.port, prompts, seed)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()

    def run(self, phase: Phase) -> list[Measured]:
        """One phase on all ranks at once, by rank."""
        for pipe in self._pipes:
            pipe.send(asdict(phase))
        return [Measured(**pipe.recv()) for pipe in self._pipes]

    def report(self) -> dict[str, Any]:
        """The experts' report of rank 0."""
        self._pipes[0].send("report")
        report: dict[str, Any] = json.loads(self._pipes[0].recv())
        return report


def _rank(
    pipe: Connection,
    spec: dict[str, Any],
    rebalance: dict[str, Any],
    size: int,
    rank: int,
    host: str,
    port: int,
    prompts: str,
    seed: int,
) -> None:
    import os
    from importlib import import_module

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the ranks share the cores, as they do in a cluster
    from moestro.router.mesh import StoreAddress
    from moestro.router.parallel import GroupShape
    from moestro.router.rebalance.config import Config
    from moestro.workers import epoch
    from moestro.workers.full_group import GroupPlace, build_rank
    from moestro.workers.rank_setup import RankSpec
    from moestro.workers.rebalancing.setup import ExpertsSpec

    experts = ExpertsSpec(rebalance=Config(**rebalance))
    rank_spec = RankSpec(**spec, shape=GroupShape(size), threads=1, experts=experts)
    observing = _Stopwatch(epoch.group_experts)
    epoch.group_experts = observing.make  # type: ignore[assignment]
    built = build_rank(rank_spec, GroupPlace(rank, 0, StoreAddress(host, port)))
    module, _, name = prompts.partition(":")
    clients = _Clients(built.loop, observing, getattr(import_module(module), name), random.Random(f"{seed} {rank}"))
    thread = threading.Thread(target=built.loop.run, args=(clients.publish,))
    thread.start()
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        if message == "report":
            pipe.send(json.dumps(asdict(built.loop.experts())))
        else:
            pipe.send(asdict(clients.run(Phase(**message))))
    built.loop.stop()
    thread.join()


@dataclass(slots=True)
class _Open:
    """A request in flight."""

    tokens: int  # prompt and output so far
    heard_at: float | None = None  # when its last token came


class _Stopwatch:
    """A rank's part in observing and moving experts, timed."""

    def __init__(self, group_experts: Callable[..., Any]) -> None:
        self._group_experts = group_experts
        self._experts: Any = None
        self._spent_s = self._steps_s = 0.0

    def make(self, *args: Any, **kwargs: Any) -> _Stopwatch:
        self._experts = self._group_experts(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def note(self) -> Any:
        return self._timed(self._experts.note)

    def turn(self, agreement: Any) -> None:
        self._timed(self._experts.turn, agreement)

    def stepped(self, seconds: float, num_tokens: int) -> None:
        self._steps_s += seconds
        self._timed(self._experts.stepped, seconds, num_tokens)

    def take(self) -> tuple[float, float]:
        """Seconds spent, and seconds of steps, since the last call."""
        spent, self._spent_s, self._steps_s = (self._spent_s, self._steps_s), 0.0, 0.0
        return spent

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        self._spent_s += time.perf_counter() - started
        return result


class _Clients:
    """Keeps a number of requests in flight at one rank."""

    def __init__(self, loop: Any, observing: _Stopwatch, prompts: Prompts, rng: random.Random) -> None:
        self._loop, self._observing, self._prompts, self._rng = loop, observing, prompts, rng
        self._lock = threading.Lock()
        self._phase: Phase | None = None
        self._open: dict[str, _Open] = {}
        self._none_open = threading.Event()
        self._count = self._tokens = 0
        self._gaps: list[float] = []

    def run(self, phase: Phase) -> Measured:
        with self._lock:
            self._phase, self._tokens, self._gaps = phase, 0, []
            self._observing.take()
            self._none_open.clear()
            for _ in range(phase.in_flight):
                self._submit(phase)
        started = time.perf_counter()
        time.sleep(phase.seconds)
        with self._lock:
            seconds = time.perf_counter() - started
            measured = Measured(self._tokens, seconds, self._gaps, *self._observing.take())
            self._phase = None
        self._none_open.wait()
        return measured

    def _submit(self, phase: Phase) -> None:
        from moestro.protos import wire
        from moestro.protos.gen import rank_pb2 as pb
        from moestro.protos.sequences import SamplingParams, SequenceRequest

        prompt = tuple(self._prompts(phase.workload, self._rng))
        sampling = SamplingParams(temperature=0.0, max_tokens=phase.output_tokens, ignore_eos=True)
        self._count += 1
        request = SequenceRequest(f"{self._count}", prompt, sampling)
        self._open[request.sequence_id] = _Open(len(prompt))
        self._loop.submit(pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString())

    def publish(self, output: Any) -> None:
        now = time.perf_counter()
        with self._lock:
            for delta in output.deltas:
                request = self._open[delta.sequence_id]
                if request.heard_at is not None and delta.token_ids:
                    self._gaps.append(now - request.heard_at)
                request.tokens += len(delta.token_ids)
                request.heard_at = now
                if delta.finish_reason is not None:
                    self._tokens += self._open.pop(delta.sequence_id).tokens
                    if self._phase is not None:
                        self._submit(self._phase)
            if not self._open:
                self._none_open.set()
