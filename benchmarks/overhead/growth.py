"""How the host's costs grow: with requests, with context, with blocks; and what a waiting request takes."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from time import thread_time_ns

import psutil
from benchmarks.overhead.host_path import host_round, scheduler_round
from benchmarks.overhead.load import TOKEN, config, request

from moestro.protos import wire
from moestro.protos.gen import rank_pb2 as pb
from moestro.workers.kv_blocks import BlockPool, chain_digest
from moestro.workers.scheduler import Scheduler

STEPS = 40
Case = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A cost over a size. Linear growth is a slope of 1 of its logarithm over that of the size."""

    title: str
    of: str  # what the size counts
    sizes: tuple[int, ...]
    case: Case  # microseconds, given a size


def _new_prompt(length: int) -> float:
    """Taking in a prompt that nobody has computed: add, plan, apply."""
    return _prompt_us(Scheduler(config(1, 2 * length)), length)


def _found_prompt(length: int) -> float:
    """The same for a prompt whose blocks are all there: named, found and shared."""
    scheduler = Scheduler(config(2, 2 * length))
    _prompt_us(scheduler, length)
    scheduler.cancel("0")
    return _prompt_us(scheduler, length)


def _prompt_us(scheduler: Scheduler, length: int) -> float:
    prompt = request(0, length)
    gc.collect()
    start = thread_time_ns()
    scheduler.add(prompt, 0.0)
    scheduler.apply(scheduler.plan(0.0), {"0": TOKEN}, 0.0)
    return (thread_time_ns() - start) / 1e3


def _make_pool(num_blocks: int) -> float:
    gc.collect()
    start = thread_time_ns()
    BlockPool(num_blocks)
    return (thread_time_ns() - start) / 1e3


def _reuse_block(num_blocks: int) -> float:
    """One block of a full pool, all of whose blocks are free and findable, handed out, named anew and given back."""
    pool = BlockPool(num_blocks)
    digests = [number.to_bytes(32, "little") for number in range(num_blocks)]
    blocks = [pool.allocate() for _ in range(num_blocks - 1)]
    for block, digest in zip(blocks, digests, strict=False):
        pool.publish(block, digest)
        pool.release(block)
    fresh = [chain_digest(b"", [number]) for number in range(1000)]
    gc.collect()
    start = thread_time_ns()
    for digest in fresh:
        block = pool.allocate()
        pool.publish(block, digest)
        pool.release(block)
    return (thread_time_ns() - start) / 1e3 / len(fresh)


CURVES = (
    Curve(
        "plan + apply", "requests running", (64, 256, 1024, 4096, 10_000), lambda n: scheduler_round(n, STEPS)["step"]
    ),
    Curve("whole host path", "requests running", (64, 256, 1024, 4096, 10_000), lambda n: host_round(n, STEPS)["step"]),
    Curve(
        "plan + apply, 64 running",
        "requests waiting",
        (10, 100, 1000, 10_000),
        lambda n: scheduler_round(64, STEPS, num_waiting=n)["step"],
    ),
    Curve(
        "whole host path, 8 running",
        "tokens of context",
        (1024, 4096, 16_384, 65_536, 131_072),
        lambda n: host_round(8, STEPS, n)["step"],
    ),
    Curve("a new prompt taken in", "tokens of context", (1024, 4096, 16_384, 65_536, 131_072), _new_prompt),
    Curve("a prompt found in the cache", "tokens of context", (1024, 4096, 16_384, 65_536, 131_072), _found_prompt),
    Curve(
        "plan + apply, 64 running",
        "blocks of the pool",
        (1000, 10_000, 100_000, 1_000_000),
        lambda n: scheduler_round(64, STEPS, spare_blocks=n)["step"],
    ),
    Curve("one block reused, all findable", "blocks of the pool", (1000, 10_000, 100_000, 1_000_000), _reuse_block),
    Curve("making the pool", "blocks of the pool", (10_000, 100_000, 1_000_000), _make_pool),
)


def slope(costs: Mapping[int, float]) -> float:
    """Of the least-squares line through the last three points, both axes logarithmic: the growth where it is large."""
    points = [(math.log(size), math.log(cost)) for size, cost in sorted(costs.items())[-3:]]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def waiting_memory(num_tokens: int, count: int = 1000) -> dict[str, float]:
    """Bytes of ``count`` waiting requests as they come from the wire: what Python allocates, and what a process that
    has done nothing else grows by."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        allocated = fresh.submit(_allocated_bytes, num_tokens, count).result()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        resident = fresh.submit(_resident_bytes, num_tokens, 10 * count).result() / 10
    return {"allocated_bytes": allocated, "resident_bytes": resident}


def _allocated_bytes(num_tokens: int, count: int) -> int:
    messages = _messages(num_tokens, count)
    scheduler = Scheduler(config(1, 2 * num_tokens, num_waiting=count))
    tracemalloc.start()
    _take_in(scheduler, messages)
    return tracemalloc.get_traced_memory()[0]


def _resident_bytes(num_tokens: int, count: int) -> int:
    messages = _messages(num_tokens, count)
    scheduler = Scheduler(config(1, 2 * num_tokens, num_waiting=count))
    before = psutil.Process().memory_info().rss
    _take_in(scheduler, messages)
    gc.collect()
    return psutil.Process().memory_info().rss - before


def _messages(num_tokens: int, count: int) -> Sequence[bytes]:
    """Token ids as those of a real vocabulary, of which few are small enough for Python to keep one object each."""
    return [wire.encode_request(request(1000 + number, num_tokens)).SerializeToString() for number in range(count)]


def _take_in(scheduler: Scheduler, messages: Sequence[bytes]) -> None:
    for message in messages:
        scheduler.add(wire.decode_request(pb.Sequence.FromString(message)), 0.0)
