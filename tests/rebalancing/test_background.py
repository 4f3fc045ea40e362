"""Background tasks: in order, one at a time, cancelled ones never heard of."""

from __future__ import annotations

import threading
import time

import pytest

from moestro.workers.rebalancing.background import Background, Cancelled
from moestro.workers.rebalancing.loader import Budget

WAIT_S = 5.0


class Bell:
    def __init__(self) -> None:
        self.rung = threading.Semaphore(0)

    def wait(self) -> None:
        assert self.rung.acquire(timeout=WAIT_S)


def test_tasks_are_numbered_and_their_results_taken_once() -> None:
    bell = Bell()
    background = Background(bell.rung.release)
    for number in (1, 2, 3):
        assert background.begin(lambda cancelled, n=number: n * 10) == number
        bell.wait()
        assert (background.done, background.failed) == (number, 0)
        assert background.take() == number * 10
        assert background.take() is None


def test_a_new_task_cancels_the_running_one_and_waits_for_it() -> None:
    bell, alive = Bell(), []
    background = Background(bell.rung.release)

    def slow(cancelled: threading.Event) -> None:
        alive.append("first")
        assert cancelled.wait(WAIT_S)
        time.sleep(0.05)
        alive.remove("first")
        raise Cancelled

    background.begin(slow)
    while not alive:
        time.sleep(0.001)
    assert background.begin(lambda cancelled: list(alive)) == 2
    bell.wait()
    assert background.take() == []
    assert background.done == 2
    assert not bell.rung.acquire(timeout=0.1), "nobody hears of a cancelled task"


def test_a_failure_is_told_and_the_next_task_runs() -> None:
    bell = Bell()
    background = Background(bell.rung.release)
    background.begin(lambda cancelled: 1 / 0)
    bell.wait()
    assert (background.done, background.failed) == (0, 1)
    assert background.failure.startswith("ZeroDivisionError")
    background.begin(lambda cancelled: "well")
    bell.wait()
    assert (background.done, background.take()) == (2, "well")


def test_a_budget_is_kept_and_a_wait_ends_when_cancelled() -> None:
    cancelled = threading.Event()
    budget = Budget(1e6, cancelled)
    started = time.monotonic()
    for _ in range(10):
        budget.spend(10_000)
    assert 0.1 <= time.monotonic() - started < 2.0
    assert budget.spent == 100_000
    threading.Timer(0.05, cancelled.set).start()
    with pytest.raises(Cancelled):
        budget.spend(10**9)
