"""What each rank does in test_rebalancing: serves while its group's experts move."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from moestro.protos import wire
from moestro.protos.errors import CheckpointError, ConfigError
from moestro.protos.experts import PlacementRequest
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.router.mesh import StoreAddress
from moestro.router.parallel import GroupShape
from moestro.router.placement import EMPTY, spread
from moestro.router.random_placement import random_placement
from moestro.router.rebalance.config import Config
from moestro.router.transports.choose import TransportKind
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.epoch import Epoch
from moestro.workers.full_group import BuiltRank, GroupPlace, build_rank
from moestro.workers.loading import open_source
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import expert_fill
from moestro.workers.rank_loop import StepOutput
from moestro.workers.rank_setup import RankSpec
from moestro.workers.rebalancing.setup import ExpertsSpec
from moestro.workers.worker import Worker
from moestro.workers.worker_state import WorkerPhase

WAIT_S = 60.0
OFF = Config(enabled=False)


class Server:
    """One rank of a group with a client of its own."""

    def __init__(
        self, rank: int, size: int, address: StoreAddress, model: str, experts: ExpertsSpec, tp: int = 1,
        kv_bytes: int = 2**20,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        spec = RankSpec(
            model=model, dtype="float32", device="cpu", threads=1, kv_bytes=kv_bytes, shape=GroupShape(size // tp, tp),
            block_size=4, max_num_sequences=8, max_num_tokens=16, experts=experts,
        )  # fmt: skip
        self.rank, self.size = rank, size
        self.built: BuiltRank = build_rank(spec, GroupPlace(rank, 0, address))
        self.loop: Worker = self.built.loop
        self.store = address.connect(WAIT_S)
        self.failure: BaseException | None = None
        self._tokens: dict[str, list[int]] = {}
        self._logprobs: dict[str, list[float]] = {}
        self._ended: dict[str, threading.Event] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.epoch = self._await_epoch()

    def _run(self) -> None:
        try:
            self.loop.run(self._publish)
        except BaseException as failure:
            self.failure = failure

    def _publish(self, output: StepOutput) -> None:
        assert not output.refusals, output.refusals
        for delta in output.deltas:
            if delta.sequence_id in self._ended:
                self._tokens[delta.sequence_id] += delta.token_ids
                self._logprobs[delta.sequence_id] += [one.logprob for one in delta.logprobs]
                if delta.finish_reason is not None:
                    self._ended[delta.sequence_id].set()

    def start(self, name: str, prompt: list[int], sampling: SamplingParams) -> None:
        self._tokens[name], self._logprobs[name], self._ended[name] = [], [], threading.Event()
        request = SequenceRequest(name, tuple(prompt), sampling)
        self.loop.submit(pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString())

    def finish(self, name: str) -> list[Any]:
        assert self._ended[name].wait(WAIT_S), f"{name} did not end; {self.failure!r}"
        return [self._tokens[name], self._logprobs[name]]

    def all_here(self, what: str) -> None:
        if self.store.add(f"count {what}", 1) == self.size:
            self.store.set(what, b"")
        self.store.wait([what])

    def _await_epoch(self) -> Epoch:
        while (epoch := self.loop._epoch) is None:
            assert self.failure is None, self.failure
            time.sleep(0.01)
        return epoch

    def await_report(self, holds: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not holds(report := self.loop.experts()):
            assert time.monotonic() < deadline, report
            assert self.failure is None, self.failure
            time.sleep(0.02)
        return report

    def stop(self) -> None:
        if self.rank == 0:
            self.loop.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert self.failure is None, self.failure

    @property
    def decoder(self) -> Decoder:
        return self.loop.model

    def torn_slots(self, model: str) -> list[str]:
        """Slots whose weights are not those of the expert that the layout names."""
        checkpoint = open_checkpoint(model)
        probe_TM = torch.randn(3, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(1))
        torn = []
        for layer, bank in self.decoder.banks.items():
            dtype = bank.experts.shape.dtype
            with open_source(checkpoint, dtype, torch.device("cpu")) as source:
                for slot, expert in enumerate(bank.layout.local_experts):
                    if expert == EMPTY:
                        continue
                    counts_L = torch.zeros(len(bank.layout.local_experts), dtype=torch.int64)
                    counts_L[slot] = 3
                    held = bank.experts.apply(probe_TM.to(dtype), counts_L)
                    wanted = bank.experts.stage(expert_fill(source, bank.prefix, expert))
                    bank.experts.replace_(slot, wanted)
                    if not torch.equal(held, bank.experts.apply(probe_TM.to(dtype), counts_L)):
                        torn.append(f"rank {self.rank} layer {layer} slot {slot}")
        return torn


def _sampling(number: int, num_tokens: int) -> SamplingParams:
    temperature = 0.0 if number % 2 else 0.9
    return SamplingParams(temperature=temperature, seed=number, max_tokens=num_tokens, ignore_eos=True, logprobs=0)


def serve_while_moving(
    rank: int, world_size: int, address: StoreAddress, model: str, prompts: list[list[int]], num_tokens: int,
    redundant: int, tp: int, seeds: list[int], transport: TransportKind | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every rank serves its share of the prompts again and again while rank 0 asks for one random placement after the
    other. Returns all answers, and what moved."""
    spec = ExpertsSpec(redundant=redundant, ranks_per_node=2, transport=transport, rebalance=OFF)
    server = Server(rank, world_size, address, model, spec, tp)
    dp = world_size // tp
    mine = {n: p for n, p in enumerate(prompts) if rank % tp == 0 and n % dp == rank // tp}
    answers: list[dict[str, Any]] = []
    switched = 0
    for turn, seed in enumerate([None, *seeds]):
        server.all_here(f"turn {turn}")
        for n, prompt in mine.items():
            server.start(f"{turn} {n}", prompt, _sampling(n, num_tokens))
        if seed is not None and rank == 0:
            server.loop.request_placement(PlacementRequest(random_seed=seed))
        answers.append({str(n): server.finish(f"{turn} {n}") for n in mine})
        if seed is not None:  # idle now: the rest of the move must come to its end all the same
            server.all_here(f"answered {turn}")
            least = switched
            report = server.await_report(
                lambda r, least=least: r.rebalancer.switched_layers > least and r.rebalancer.activity == "idle"
            )
            switched = report.rebalancer.switched_layers
    report = server.loop.experts()
    server.stop()
    return {
        "answers": answers,
        "switched": switched,
        "slots": [layer.slots for layer in report.layers],
        "load": [sum(layer.load) for layer in report.layers],
        "torn": server.torn_slots(model),
    }


def killed_while_moving(
    rank: int, world_size: int, address: StoreAddress, model: str, kill_after: int
) -> dict[str, Any]:
    """The last rank dies in the middle of a move, when so many layers have switched. The others find every slot as
    their layout says."""
    spec = ExpertsSpec(rebalance=Config(enabled=False, bytes_per_s=60_000))
    server = Server(rank, world_size, address, model, spec)
    for number in range(400):  # a group that sleeps would not notice
        server.start(f"{number}", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    server.all_here("busy")
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=3))
    server.await_report(lambda r: r.rebalancer.activity == "moving" and r.rebalancer.switched_layers == kill_after)
    server.all_here("moving")
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while server.loop.state.phase is not WorkerPhase.BROKEN:
        assert time.monotonic() < deadline, "nobody noticed"
        time.sleep(0.01)
    server.loop.stop()  # it waits for another view
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    even = spread(8, world_size).slots
    return {
        "torn": server.torn_slots(model),
        "moved": [bank.layout.placement.slots != even for bank in server.decoder.banks.values()],
    }


def fail_to_load(rank: int, world_size: int, address: StoreAddress, model: str) -> dict[str, Any]:
    """The checkpoint can no longer be read on one rank: the move ends, all go on serving, and a later one succeeds."""
    server = Server(rank, world_size, address, model, ExpertsSpec(rebalance=OFF))
    experts: Any = server.epoch.experts
    readable = experts._open_source
    if rank == 1:

        def unreadable() -> Any:
            raise CheckpointError("model.safetensors: the disk is gone")

        experts._open_source = unreadable
    server.all_here("ready")
    before = _answer(server, "before")
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=1))
    failed = server.await_report(lambda r: any(d.outcome == "cancelled" for d in r.decisions))
    after = _answer(server, "after")
    experts._open_source = readable
    server.all_here("repaired")
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=1))
    server.await_report(lambda r: r.rebalancer.switched_layers == len(r.layers) and r.rebalancer.activity == "idle")
    moved = _answer(server, "moved")
    server.stop()
    return {
        "same": before == after == moved,
        "reasons": [d.reason for d in failed.decisions if d.outcome == "cancelled"],
        "torn": server.torn_slots(model),
    }


def stopped_while_moving(rank: int, world_size: int, address: StoreAddress, model: str) -> dict[str, Any]:
    """The server is told to stop while experts travel: it does, at once."""
    spec = ExpertsSpec(rebalance=Config(enabled=False, bytes_per_s=50_000))
    server = Server(rank, world_size, address, model, spec)
    server.all_here("ready")
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=3))
    server.await_report(lambda r: r.rebalancer.activity == "moving")
    server.all_here("moving")
    started = time.monotonic()
    server.stop()
    return {"seconds": time.monotonic() - started, "torn": server.torn_slots(model)}


def second_while_first(rank: int, world_size: int, address: StoreAddress, model: str) -> dict[str, Any]:
    """Another placement is asked for, on another rank, while the first is under way: the second is what comes out."""
    spec = ExpertsSpec(rebalance=Config(enabled=False, bytes_per_s=400_000))
    server = Server(rank, world_size, address, model, spec)
    server.all_here("ready")
    before = _answer(server, "before")
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=3))
    server.await_report(lambda r: r.rebalancer.activity == "moving")
    if rank == 1:
        server.loop.request_placement(PlacementRequest(random_seed=4))
    wanted = tuple(random_placement(8, world_size, -(-8 // world_size), f"4 {layer}").slots for layer in range(2))
    server.await_report(
        lambda r: r.rebalancer.activity == "idle" and tuple(layer.slots for layer in r.layers) == wanted
    )
    after = _answer(server, "after")
    server.stop()
    return {"same": before == after, "torn": server.torn_slots(model)}


def _answer(server: Server, name: str) -> list[Any]:
    server.start(name, [3, 1, 4, 1, 5], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0))
    answer = server.finish(name)
    server.all_here(f"answered {name}")
    return answer


def to_the_end(
    rank: int, world_size: int, address: StoreAddress, model: str, prompts: list[list[int]], eos: list[int],
    redundant: int,
) -> dict[str, list[int]]:  # fmt: skip
    """Greedy answers until the model itself ends them, with replicas, at random places that change half way."""
    spec = ExpertsSpec(redundant=redundant, rebalance=OFF)
    server = Server(rank, world_size, address, model, spec, kv_bytes=2**24)
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=8))
    replicas = server.await_report(lambda r: r.rebalancer.switched_layers == len(r.layers)).layers[0].slots
    assert any(sum(of_rank.count(e) for of_rank in replicas) > 1 for e in range(8)), "nothing is replicated"
    server.all_here("ready")
    mine = {n: p for n, p in enumerate(prompts) if n % world_size == rank}
    for n, prompt in mine.items():
        sampling = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=300, eos_token_ids=tuple(eos))
        server.start(f"{n}", prompt, sampling)
    if rank == 0:
        server.loop.request_placement(PlacementRequest(random_seed=9))
    answers = {str(n): server.finish(f"{n}")[0] for n in mine}
    server.all_here("answered")
    server.stop()
    return answers


def ask_for_deep_ep(rank: int, world_size: int, address: StoreAddress, model: str) -> str:
    """What is said where DeepEP is asked for and is not there."""
    spec = RankSpec(model, device="cpu", shape=GroupShape(world_size), experts=ExpertsSpec(transport="deep_ep"))
    try:
        build_rank(spec, GroupPlace(rank, 0, address)).loop.run(lambda output: None)
    except ConfigError as error:
        return str(error)
    return "it was built"
