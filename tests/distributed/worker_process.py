"""One worker in a process of its own, driven through a pipe: what the tests of epochs start, kill and replace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from moestro.kernels.native_module import BuildError
from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.router.mesh import StoreAddress
from moestro.router.native import build
from moestro.router.placement import EMPTY
from moestro.router.view import Member, View
from moestro.workers.model.moe import expert_fill
from moestro.workers.rank_loop import StepOutput
from moestro.workers.rank_setup import RankSpec
from moestro.workers.worker import Worker
from moestro.workers.worker_state import WorkerState


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker process is started with."""

    spec: RankSpec
    store: StoreAddress
    seat: int
    worker: int
    held: list[list[int]] | None = None
    boards: bool = True


def serve(pipe: Connection, start: Start) -> None:
    """Says ("state", ...), ("load", ...), ("delta", ...), ("lost", ...) and ("checked", ...); hears ("form", ...),
    ("submit", ...), ("cancel", id), ("check",), ("part",) and ("stop",): to "part" is to go a way of its own."""
    torch.set_num_threads(1)
    if not start.boards:
        build.load = _no_boards  # type: ignore[assignment]
    leads = start.seat % start.spec.shape.tp == 0
    lock = threading.Lock()

    def say(*what: Any) -> None:
        with lock:
            pipe.send(what)

    def told(state: WorkerState) -> None:
        say("state", state, time.monotonic())

    def publish(output: StepOutput) -> None:
        assert not output.refusals, output.refusals
        if not leads:  # a peer says what its leader says
            return
        say("load", output.load)
        for delta in output.deltas:
            say("delta", delta, time.monotonic())
        for name, reason in output.lost:
            say("lost", name, reason)

    worker = Worker(start.spec, start.store, start.seat, start.worker, on_state=told)
    worker.load(start.held)
    thread = threading.Thread(target=worker.run, args=(publish,), daemon=True)
    thread.start()
    while True:
        match pipe.recv():
            case ("form", epoch, members, tp):
                worker.form(View(epoch, tuple(Member(*member) for member in members), tp))
            case ("submit", name, prompt, output, sampling):
                request = SequenceRequest(name, tuple(prompt), SamplingParams(**sampling), tuple(output))
                worker.submit(pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString())
            case ("cancel", name):
                worker.submit(pb.AttachRequest(cancel=name).SerializeToString())
            case ("part",):
                worker._account.messages += 1
            case ("check",):
                say("checked", _problems(worker), worker.holdings(), worker.state)
            case ("stop",):
                worker.stop()
                thread.join(20)
                return


def _no_boards() -> Any:
    raise BuildError("the test wants none")


def _problems(worker: Worker) -> list[str]:
    """What is wrong with a worker that has nothing to do: leaked blocks, slots that hold what they do not say."""
    worker._scheduler.check_integrity()
    used = worker._scheduler.load().kv_blocks_used
    problems = [f"{used} blocks are in use"] if used else []
    probe_TM = torch.randn(3, worker.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer, bank in worker.model.banks.items():
        probe_TM = probe_TM.to(bank.experts.shape.dtype)
        with worker._share.open_source() as source:
            for slot, expert in enumerate(bank.held):
                if expert == EMPTY:
                    continue
                counts_L = torch.zeros(len(bank.held), dtype=torch.int64)
                counts_L[slot] = len(probe_TM)
                held = bank.experts.apply(probe_TM, counts_L)
                bank.experts.replace_(slot, bank.experts.stage(expert_fill(source, bank.prefix, expert)))
                if not torch.equal(held, bank.experts.apply(probe_TM, counts_L)):
                    problems.append(f"layer {layer} slot {slot} does not hold expert {expert}")
    return problems
