"""A rank of a real group that gets less of a processor than the others is named, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from benchmarks.small_models import make_model, random_ids, save_model
from tests.distributed.worker_group import WorkerGroup

from moestro.router.parallel import GroupShape
from moestro.router.rebalance.config import Config
from moestro.workers.rank_setup import RankSpec
from moestro.workers.rebalancing.setup import ExpertsSpec

SLOW_SEAT = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 16}
    return str(save_model(make_model("qwen3_moe", seed=21, **wide).bfloat16(), tmp_path_factory.mktemp("model")))


@contextmanager
def busy_group(model: str, window_s: float, dp: int = 2) -> Iterator[WorkerGroup]:
    """Each rank has two streams at any time."""
    spec = RankSpec(
        model=model, device="cpu", threads=1, kv_bytes=2**24, shape=GroupShape(dp), block_size=4, max_num_sequences=8,
        max_num_tokens=16, experts=ExpertsSpec(rebalance=Config(enabled=False, window_s=window_s)), watchdog_s=3.0,
    )  # fmt: skip
    with WorkerGroup(spec) as group:
        group.start()
        over = threading.Event()

        def load(seat: int) -> None:
            turn = 0
            while not over.is_set():
                names = [f"{seat} {turn} {kind}" for kind in range(2)]
                for name in names:
                    group.submit(name, seat, random_ids(8, seed=turn), {"temperature": 0.0, "max_tokens": 400,
                                 "ignore_eos": True})  # fmt: skip
                group.await_done(names)
                turn += 1

        threads = [threading.Thread(target=load, args=(seat,)) for seat in range(dp)]
        for thread in threads:
            thread.start()
        try:
            yield group
        finally:
            over.set()
            for thread in threads:
                thread.join()


def slowness(group: WorkerGroup) -> list[float]:
    return [handle.load.slowness for handle in group.seats.values()]


def await_slowness(group: WorkerGroup, holds: Callable[[list[float]], bool], limit_s: float) -> float:
    """How long it took."""
    began = time.monotonic()
    with group.changed:
        assert group.changed.wait_for(lambda: holds(slowness(group)), limit_s), slowness(group)
    return time.monotonic() - began


@contextmanager
def stopped_most_of_the_time(pid: int, running: float = 0.2, period_s: float = 0.05) -> Iterator[None]:
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(running * period_s):
            os.kill(pid, signal.SIGSTOP)
            time.sleep((1 - running) * period_s)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def crowded(pid: int, core: int = 0, burners: int = 3) -> Iterator[None]:
    """On one core with processes that never rest and go before it."""
    burn = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(burners)]
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    everywhere = os.sched_getaffinity(pid)
    for thread in threads:
        os.sched_setaffinity(thread, {core})
        os.setpriority(os.PRIO_PROCESS, thread, 5)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            os.sched_setaffinity(thread, everywhere)
            os.setpriority(os.PRIO_PROCESS, thread, 0)


def test_a_rank_that_is_stopped_most_of_the_time_is_named_and_forgiven(model: str) -> None:
    """Observed eight times as often as usual."""
    with busy_group(model, window_s=2.0) as group:
        pid = group.seats[SLOW_SEAT].process.pid
        assert pid is not None
        with stopped_most_of_the_time(pid):
            await_slowness(group, lambda told: told[SLOW_SEAT] > 1.5 and told[0] == 1.0, 20.0)
        await_slowness(group, lambda told: told[SLOW_SEAT] == 1.0, 20.0)


@pytest.mark.long
@pytest.mark.parametrize("slow", [stopped_most_of_the_time, crowded])
def test_at_the_usual_pace_it_takes_less_than_half_a_minute_and_nobody_is_named_before(
    model: str, slow: Callable[[int], AbstractContextManager[None]]
) -> None:
    with busy_group(model, window_s=20.0) as group:
        pid = group.seats[SLOW_SEAT].process.pid
        assert pid is not None
        quiet_until = time.monotonic() + 60.0
        while time.monotonic() < quiet_until:
            assert slowness(group) == [1.0, 1.0]
            time.sleep(0.5)
        with slow(pid):
            named_s = await_slowness(group, lambda told: told[SLOW_SEAT] > 1, 30.0)
            told = slowness(group)
        forgiven_s = await_slowness(group, lambda told: told == [1.0, 1.0], 60.0)
    print(f"{slow.__name__}: named after {named_s:.1f} s as {told}, forgiven after {forgiven_s:.1f} s")
