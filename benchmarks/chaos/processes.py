"""A cluster without Ray: real workers, rank servers, gateways and membership as plain processes.

It starts and restarts much faster, so that hundreds of faults take minutes, and its ranks may be on hosts of their own,
which can be cut off from the network.
"""

from __future__ import annotations

import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from benchmarks.chaos.network import Host, network
from benchmarks.chaos.ports import free_port
from benchmarks.chaos.served import ROOT, START_S, STOP_S, Shape
from benchmarks.chaos.system import NotPossible, Role, Target

from moestro.cluster.client import Client
from moestro.protos.errors import MoestroError


@dataclass(frozen=True)
class Processes:
    """Implements ``System``."""

    address: str
    shape: Shape
    supervisor: psutil.Process
    told: Path
    hosts: tuple[Host, ...]

    @property
    def num_ranks(self) -> int:
        return self.shape.num_ranks

    def processes(self) -> Sequence[psutil.Process]:
        return [self.supervisor, *self.supervisor.children(recursive=True)]

    def targets(self, role: Role) -> Sequence[Target]:
        if role not in (Role.RANK, Role.GATEWAY):
            raise NotPossible(f"kill {role.value}: there is none without Ray")
        found = sorted(json.loads(self.told.read_text())[role.value])
        return [Target(role, name, pid) for name, pid in found if psutil.pid_exists(pid)]

    @contextmanager
    def partitioned(self, target: Target) -> Iterator[None]:
        seat = re.search(r"rank (\d+)", target.name)
        if not self.hosts or seat is None:
            raise NotPossible("partition: ranks share this machine's network; see --hosts")
        with self.hosts[int(seat[1]) % len(self.hosts)].cut_off():
            yield

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        raise NotPossible("full disk: nothing is written without Ray")
        yield


@contextmanager
def processes(shape: Shape, on_hosts: bool = False, threads: int = 1) -> Iterator[Processes]:
    """A cluster at full strength; nothing of it outlives the block. ``on_hosts``: each seat on a host of its own."""
    with tempfile.TemporaryDirectory(prefix="mo") as folder, ExitStack() as stack:
        net = stack.enter_context(network(shape.dp * shape.tp)) if on_hosts else None
        port, told = free_port(), Path(folder) / "processes.json"
        orders = {
            "config": configuration(shape, threads, port),
            "secret": secrets.token_hex(16),
            "listen": net.here if net else "127.0.0.1",
            "hosts": [[host.name, host.address] for host in net.hosts] if net else [],
            "told": str(told),
        }
        log = stack.enter_context(open(Path(folder) / "log", "w"))
        command = [sys.executable, "-m", "benchmarks.chaos.supervisor_process", json.dumps(orders)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            address = f"127.0.0.1:{port}"
            _wait_whole(process, address, shape.num_ranks, Path(folder) / "log")
            yield Processes(address, shape, psutil.Process(process.pid), told, net.hosts if net else ())
        finally:
            _end(process)


def configuration(shape: Shape, threads: int, port: int) -> dict[str, Any]:
    """As a configuration file would have it."""
    return {
        "cluster": asdict(shape),
        "rank": {"kv_memory": "32MiB", "threads": threads, "device": "cpu"},
        "server": {"port": port, "drain_s": 1.0},
    }


def _wait_whole(process: subprocess.Popen[bytes], address: str, num_ranks: int, log: Path) -> None:
    """Raises RuntimeError with what was said."""
    deadline = time.monotonic() + START_S
    with Client(address, timeout_s=2.0, retries=0) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(MoestroError, TimeoutError):
                ranks = [rank for group in client.status().groups for rank in group.ranks]
                if sum(rank.state == "serving" for rank in ranks) == num_ranks:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the cluster did not come up:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Only what was started here."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S / 10)
    for each in [*family, process]:
        with suppress(psutil.Error, ProcessLookupError):
            each.kill()
    process.wait()
