"""benchmarks.peers: the protocol with real processes, turns, and engines that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from benchmarks.peers.environments import CannotBuild, Environment, build, faults
from benchmarks.peers.field import Field
from benchmarks.peers.measure import Plan, measure_batches, measure_load
from benchmarks.peers.process import Turn, Worker, WorkerFailed
from benchmarks.peers.quiet import Patience, quietest

ROOT = Path(__file__).resolve().parents[2]
LOAD = {"op": "load", "model": "none", "threads": 1, "max_sequences": 4, "max_length": 256, "cache_bytes": 1}
VARIABLES = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
IMPATIENT = Patience()

Make = Callable[[str], Worker]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    workers: list[Worker] = []

    def start(engine: str) -> Worker:
        command = [sys.executable, "-m", "benchmarks.peers.worker", f"fake_engine:{engine}"]
        workers.append(Worker(command, VARIABLES, tmp_path / f"{engine}.log", ROOT))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def batch(prompts: list[list[int]], num_output: int) -> dict[str, object]:
    return {"op": "batch", "prompts": prompts, "num_output": num_output}


def state(worker: Worker) -> str:
    return psutil.Process(worker.pid).status()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_worker_answers_whatever_its_engine_prints(make: Make, tmp_path: Path) -> None:
    worker = make("Echo")
    worker.ask(LOAD, 30)
    answer = worker.ask(batch([[5, 9], [1, 2]], 3), 30).answer
    assert answer["tokens"] == [[9, 10, 11], [2, 3, 4]]
    assert answer["num_decoded"] == 4
    assert answer["prefill_s"] > 0
    assert answer["decode_s"] > 0
    assert "talks on stdout" in (log := (tmp_path / "Echo.log").read_text())
    assert "below Python" in log


def test_a_worker_is_stopped_between_its_turns(make: Make) -> None:
    worker = make("Spins")
    worker.ask(LOAD, 30)
    assert eventually(lambda: state(worker) == psutil.STATUS_STOPPED)
    process = psutil.Process(worker.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(0.3)
    assert sum(process.cpu_times()[:2]) == before, "a stopped worker used a core"
    assert worker.memory().peak >= worker.memory().resident > 2**20
    worker.close()
    assert not psutil.pid_exists(worker.pid)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("NeverLoads", "ValueError: this model is not for me"),
        ("Dies", "status 7: terminate called"),
        ("Hangs", "no answer in time"),
        ("SaysTooMuch", "asked for 3 tokens, got 4"),
    ],
)
def test_an_engine_that_fails_is_ended_with_its_reason(make: Make, engine: str, reason: str) -> None:
    worker = make(engine)

    def talk() -> None:
        worker.ask(LOAD, 30)
        worker.ask(batch([[1]], 3), 1.5)

    with pytest.raises(WorkerFailed, match=reason):
        talk()
    assert not psutil.pid_exists(worker.pid)


def test_workers_end_with_their_parent() -> None:
    code = f"""
import sys, time
from pathlib import Path
from benchmarks.peers.process import Worker
worker = Worker([sys.executable, "-m", "benchmarks.peers.worker", "fake_engine:Echo"], {VARIABLES!r}, Path("/dev/null"),
                Path({str(ROOT)!r}))
worker.ask({LOAD!r}, 30)
print(worker.pid, flush=True)
time.sleep(60)
"""
    path = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=path, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.send_signal(signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


PLAN = Plan(rounds={1: 2, 3: 1}, seed=5, threads=1, load_s=0.1, load_rounds=1, patience=IMPATIENT)


def test_one_engine_fails_and_the_others_go_on(make: Make) -> None:
    field = Field(IMPATIENT, {"absent": "no environment"})
    made = {engine: make(engine) for engine in ("Echo", "Dies", "Spins", "NeverLoads")}
    for engine, worker in made.items():
        field.start(engine, lambda worker=worker: worker, LOAD, 30)
    rows = list(measure_batches(field, PLAN, lambda text: None))
    assert {"absent", "Dies", "NeverLoads"} == set(field.failures)
    assert field.failures["absent"] == "no environment"
    assert "failed at batch" in field.failures["Dies"]
    assert "did not start" in field.failures["NeverLoads"]
    turns = [(row["round"], row["batch"], row["engine"]) for row in rows]
    assert turns == [(0, 1, "Echo"), (0, 1, "Spins"), (0, 3, "Echo"), (0, 3, "Spins"), (1, 1, "Spins"), (1, 1, "Echo")]
    assert all(row["decode_tokens_per_s"] > 0 for row in rows)
    assert list(field.memory()) == ["Echo", "Spins"]
    made["Echo"].kill()
    assert list(field.memory()) == ["Spins"], "one that ended between its turns is out as well"
    assert "between turns" in field.failures["Echo"]

    loads = list(measure_load(field, PLAN, 400.0, ["Spins", "Dies"], lambda text: None))
    assert [row["engine"] for row in loads] == ["Spins"]
    assert len(loads[0]["ttft_s"]) == 40
    assert min(loads[0]["ttft_s"]) >= 0
    field.close()


def test_the_quietest_turn_counts_not_the_fastest() -> None:
    turns = [Turn({"s": 1.0}, 0.9), Turn({"s": 3.0}, 0.4), Turn({"s": 2.0}, 0.5), Turn({"s": 0.5}, 0.1)]
    patience = Patience(most_cores=0.2, repeats=2)
    queue = iter(turns)
    assert quietest(lambda: next(queue), patience, wait=lambda _: None) is turns[1]
    assert quietest(lambda: next(queue), patience, wait=lambda _: None) is turns[3]


def test_an_environment_is_judged_by_what_is_in_it(tmp_path: Path) -> None:
    environment = Environment({"one": "1.0", "two": "2.0"}, unwanted=("three",))
    assert faults(environment, {"one": "1.0", "two": "2.0", "four": "4"}) == []
    assert faults(environment, {"one": "1.1", "three": "3"}) == [
        "one 1.0 is 1.1",
        "two 2.0 is missing",
        "three is in the way",
    ]


def test_an_environment_that_is_complete_is_left_alone_and_one_that_cannot_be_says_why(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(Path(sys.prefix))
    here = Environment({"psutil": psutil.__version__})
    assert build(here, tmp_path / "here") is False
    venv.create(tmp_path / "bare", with_pip=False)
    with pytest.raises(CannotBuild, match="No module named pip"):
        build(here, tmp_path / "bare")
