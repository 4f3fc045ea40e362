"""What one rank process of ``test_group_engine`` does: join one group after another and generate in each."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import torch

from moestro.protos import wire
from moestro.protos.errors import ConfigError
from moestro.protos.gen import rank_pb2 as pb
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.router.mesh import StoreAddress
from moestro.router.parallel import GroupShape
from moestro.router.view import Member, View
from moestro.workers.full_group import GroupPlace, build_rank
from moestro.workers.rank_loop import StepOutput
from moestro.workers.rank_setup import RankSpec
from moestro.workers.worker import Worker
from moestro.workers.worker_state import WorkerPhase, WorkerState

WAIT_S = 60.0


def generate(
    rank: int,
    world_size: int,
    address: StoreAddress,
    model: str,
    shapes: list[list[int]],
    prompts: list[list[int]],
    num_tokens: int,
) -> list[dict[str, list[int]]]:
    """Greedy tokens of the prompts this rank was given, by prompt number, one entry per shape. Prompts are dealt to
    the leaders of each group in turn; a rank beyond a group's size sits that group out."""
    torch.set_num_threads(1)
    results = []
    for epoch, (dp, tp) in enumerate(shapes):
        shape = GroupShape(dp, tp)
        mine: dict[str, list[int]] = {}
        if rank < shape.world_size:
            spec = RankSpec(
                model=model, device="cpu", threads=1, kv_bytes=2**20, shape=shape, block_size=4, max_num_sequences=8,
                max_num_tokens=16,
            )  # fmt: skip
            leads = shape.tp_rank(rank) == 0
            dealt = {n: p for n, p in enumerate(prompts) if leads and n % dp == shape.dp_rank(rank)}
            mine = _generate(spec, GroupPlace(rank, epoch, address), dealt, num_tokens)
        results.append(mine)
    return results


def idle_seconds(rank: int, world_size: int, address: StoreAddress, model: str) -> dict[str, float]:
    """Processor seconds a rank of a dp group uses over two seconds without work, after it has done some."""
    spec = RankSpec(model=model, device="cpu", threads=1, kv_bytes=2**20, shape=GroupShape(world_size, 1))
    used: dict[str, float] = {}

    def rest() -> None:
        process = psutil.Process()
        before = sum(process.cpu_times()[:2])
        threading.Event().wait(2.0)
        used["seconds"] = sum(process.cpu_times()[:2]) - before

    tokens = _generate(spec, GroupPlace(rank, 0, address), {rank: [5, 6, 7]} if rank == 0 else {}, 4, rest)
    return {**used, "tokens": float(sum(map(len, tokens.values())))}


def _generate(
    spec: RankSpec, place: GroupPlace, prompts: dict[int, list[int]], num_tokens: int, rest: Any = lambda: None
) -> dict[str, list[int]]:
    built = build_rank(spec, place)
    store = place.store.connect(WAIT_S)
    tokens: dict[str, list[int]] = {str(number): [] for number in prompts}
    unfinished = set(tokens)
    done = threading.Event()

    def publish(output: StepOutput) -> None:
        assert not output.refusals, output.refusals
        for delta in output.deltas:
            if delta.sequence_id in tokens:  # a tensor-parallel peer sees its leader's sequences too
                tokens[delta.sequence_id].extend(delta.token_ids)
                if delta.finish_reason is not None:
                    unfinished.discard(delta.sequence_id)
        if not unfinished:
            done.set()

    thread = threading.Thread(target=built.loop.run, args=(publish,))
    thread.start()
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for number, prompt in prompts.items():
        request = SequenceRequest(str(number), tuple(prompt), sampling)
        built.loop.submit(pb.AttachRequest(submit=wire.encode_request(request)).SerializeToString())
    if prompts:
        assert done.wait(WAIT_S), f"unfinished after {WAIT_S} s: {unfinished}"
    _all_here(store, f"done {place.epoch}", spec.shape.world_size)
    rest()
    _all_here(store, f"rested {place.epoch}", spec.shape.world_size)
    if place.rank == 0:
        built.loop.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "the loop did not stop with the group"
    return tokens


def _all_here(store: Any, what: str, world_size: int) -> None:
    if store.add(f"count {what}", 1) == world_size:
        store.set(what, b"")
    store.wait([what])


def with_kernels_of_its_own(rank: int, world_size: int, address: StoreAddress, model: str) -> str:
    """What a rank says whose host has led to other kernels than its peer's."""
    spec = RankSpec(model, shape=GroupShape(world_size), kernels="auto" if rank == 0 else "plain", threads=1)
    reasons: list[str] = []

    def told(state: WorkerState) -> None:
        if state.phase is WorkerPhase.BROKEN:
            reasons.append(state.reason)
            worker.stop()

    worker = Worker(spec, address, rank, rank, on_state=told)
    worker.load()
    worker.form(View(1, tuple(Member(each, each) for each in range(world_size))))
    try:
        worker.run(lambda output: None)
    except ConfigError as error:
        return str(error)
    return reasons[0]
