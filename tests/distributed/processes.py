"""Runs one function in several real processes that share a store, for tests of groups.

    results = run_processes("tests.distributed.workloads:some_test", world_size=4, kwargs={"seed": 1})

The function is named as ``module:function`` and called as ``function(rank, world_size, address, **kwargs)``; its
keyword arguments and what it returns are JSON. Nothing is pickled. A process that fails is reported with its
traceback, the others are then ended; none outlives the call. Tensors are handed back by way of a file: give the
function a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from moestro.router.mesh import StoreAddress, serve_store

ROOT = Path(__file__).resolve().parents[2]


def start_process(
    function: str, rank: int, world_size: int, address: StoreAddress, folder: Path, kwargs: dict[str, Any]
) -> subprocess.Popen[bytes]:
    """One process. It writes ``folder/<rank>.json`` when done and whatever it prints to ``folder/<rank>.log``."""
    call = {
        "function": function,
        "rank": rank,
        "world_size": world_size,
        "host": address.host,
        "port": address.port,
        "kwargs": kwargs,
        "result": str(folder / f"{rank}.json"),
    }
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(call)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def run_processes(
    function: str, world_size: int, kwargs: dict[str, Any] | None = None, timeout_s: float = 60.0
) -> list[Any]:
    """What the function returned on each rank. Raises AssertionError with the logs of the ranks when one fails or
    they are not done in ``timeout_s``."""
    store, address = serve_store(timeout_s=timeout_s)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world_size):
                started.append(start_process(function, rank, world_size, address, folder, kwargs or {}))
            trouble = _wait(started, time.monotonic() + timeout_s)
        finally:
            _reap(started)
            del store
        if trouble:
            raise AssertionError(f"{function}: {trouble}\n{_logs(folder, world_size)}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _wait(started: list[subprocess.Popen[bytes]], deadline: float) -> str:
    """Empty when all ended well, else what went wrong. Peers get a moment to report the failure of one."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in started]
        if any(code not in (None, 0) for code in codes):
            time.sleep(0.5)
            return f"exit codes by rank {[process.poll() for process in started]} (None: still running)"
        if None not in codes:
            return ""
        time.sleep(0.02)
    return f"not done in time; exit codes by rank {[process.poll() for process in started]}"


def _reap(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()
    for process in started:
        process.wait()


def _logs(folder: Path, world_size: int) -> str:
    logs = [(rank, (folder / f"{rank}.log").read_text(errors="replace")) for rank in range(world_size)]
    return "\n".join(f"--- rank {rank}\n{log[-4000:]}" for rank, log in logs)


def _main() -> None:
    call = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    module, _, name = call["function"].partition(":")
    function = getattr(import_module(module), name)
    result = function(call["rank"], call["world_size"], StoreAddress(call["host"], call["port"]), **call["kwargs"])
    Path(call["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
