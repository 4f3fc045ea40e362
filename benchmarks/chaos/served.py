"""A cluster as a user starts it: ``moestro serve`` in a process of its own, with real Ray processes behind it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.chaos.disk import filled, small_disk
from benchmarks.chaos.ports import free_port
from benchmarks.chaos.system import NotPossible, Role, Target

ROOT = Path(__file__).resolve().parents[2]
START_S, STOP_S = 300.0, 60.0

# What Ray titles the process of an actor, by role. Those of Serve's replicas have the deployment's name in them.
_TITLES = {
    Role.RANK: "ray::Rank",
    Role.GATEWAY: "ray::ServeReplica:moestro:Gateway",
    Role.SUPERVISOR: "ray::ServeReplica:moestro:Group",
    Role.DIRECTORY: "ray::ServeReplica:moestro:Directory",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What is started."""

    groups: int = 1
    dp: int = 3
    tp: int = 1
    gateways: int = 2

    @property
    def num_ranks(self) -> int:
        return self.groups * self.dp * self.tp

    def ranks_lost_with(self, role: Role) -> int:
        """See ``System``."""
        return {Role.RANK: self.tp, Role.SUPERVISOR: self.dp * self.tp, Role.HEAD: self.num_ranks}.get(role, 0)


@dataclass(frozen=True)
class Served:
    """Implements ``System``."""

    address: str
    shape: Shape
    server: psutil.Process
    disk: Path | None  # where the cluster writes, when that is a disk of its own

    @property
    def num_ranks(self) -> int:
        return self.shape.num_ranks

    def ranks_lost_with(self, role: Role) -> int:
        return self.shape.ranks_lost_with(role)

    def processes(self) -> Sequence[psutil.Process]:
        return [self.server, *self.server.children(recursive=True)]

    def targets(self, role: Role) -> Sequence[Target]:
        if role is Role.HEAD:
            raise NotPossible("kill head: ranks are on the head's own node here; `make test-head` has it on Redis")
        found = [(each.pid, title) for each in self.processes() if _TITLES[role] in (title := _title(each))]
        return [Target(role, f"{role.value} {number}", pid) for number, (pid, _) in enumerate(sorted(found))]

    @contextmanager
    def partitioned(self, target: Target) -> Iterator[None]:
        raise NotPossible("partition: Ray's processes on one machine share its network; see --hosts")
        yield

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        if self.disk is None:
            raise NotPossible("full disk: mounting a small one needs root")
        with filled(self.disk):
            yield


@contextmanager
def served(shape: Shape, threads: int = 1, settings: str = "", root: Path = ROOT) -> Iterator[Served]:
    """A cluster that is ready; nothing of it outlives the block. ``settings``: more TOML for its
    configuration; ``root``: the tree whose code it runs."""
    with tempfile.TemporaryDirectory(prefix="mo") as folder, ExitStack() as stack:
        home = Path(folder)
        disk = stack.enter_context(small_disk(home / "d"))
        config = home / "serve.toml"
        config.write_text(
            f"[cluster]\ngroups = {shape.groups}\ndp = {shape.dp}\ntp = {shape.tp}\ngateways = {shape.gateways}\n"
            f'dashboard_port = {free_port()}\n[rank]\nkv_memory = "32MiB"\nthreads = {threads}\n'
            f"[server]\nport = {free_port()}\ndrain_s = 5.0\n{settings}"
        )
        log = stack.enter_context(open(home / "log", "w"))
        process = subprocess.Popen(
            [sys.executable, "-m", "moestro.cluster.cli.main", "serve", "--config", str(config)],
            env=_environment(home, disk or home, root),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield Served(_wait_ready(process, home / "log"), shape, psutil.Process(process.pid), disk)
        finally:
            _end(process)


def _environment(home: Path, writes: Path, root: Path) -> dict[str, str]:
    """A user who has never run Ray, whose sockets need a short path, but who has compiled kernels before."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "HOME": str(home),
        "RAY_TMPDIR": str(writes),
        "XDG_CACHE_HOME": cache,
        "PYTHONPATH": str(root / "src"),
        "COLUMNS": "200",
    }


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address it listens on. Raises RuntimeError with what it said."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        match = re.search(r"^ready\s+\S+ on (\S+?),", log.read_text(), re.MULTILINE)
        if match and "Ctrl-C stops" in log.read_text():
            return match[1]
        time.sleep(0.1)
    raise RuntimeError(f"the cluster did not come up:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Only processes of this server."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for each in family:
        if each.is_running():
            each.kill()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""
