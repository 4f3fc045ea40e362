"""Servers as a user starts them: ``moestro`` in a process of its own, with real Ray processes behind it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from moestro.cluster.client import Client

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
STOP_S = 40.0

SMALL = """
[rank]
kv_memory = "8MiB"
threads = 1
[cluster]
dashboard_port = {dashboard_port}
[server]
drain_s = 5.0
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """A user who has never run Ray; its sockets need a short path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # with what was compiled for all tests
    new = {"HOME": str(home), "RAY_TMPDIR": str(home), "XDG_CACHE_HOME": cache, "PYTHONPATH": path, "COLUMNS": "200"}
    new["RAY_worker_niceness"] = (
        "0"  # Ray puts its workers behind everything else: whatever runs beside would starve them
    )
    return kept | new | more


@contextmanager
def short_home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mo"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def moestro(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moestro.cluster.cli.main", *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    home: Path, *arguments: object, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    env = env or environment(home)
    return subprocess.run(
        moestro(*arguments), env=env, input=stdin, capture_output=True, text=True, timeout=START_S, check=False
    )


@dataclass
class Server:
    """One ``moestro serve``, in a session of its own as under a terminal."""

    home: Path
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # standard error
    output: list[str] = field(default_factory=list)  # standard output
    family: list[psutil.Process] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def address(self) -> str:
        match = re.search(r"^ready\s+\S+ on (\S+?),", self.text, re.MULTILINE)
        assert match, self.text
        return match[1]

    @property
    def dashboard(self) -> str:
        match = re.search(r"dashboard\s+(http://\S+)", self.text)
        assert match, self.text
        return match[1]

    def client(self, retries: int = 0) -> Client:
        return Client(self.address, timeout_s=60.0, retries=retries)

    def find(self, title: str) -> list[psutil.Process]:
        """Processes below the server whose title has this in it."""
        return [each for each in self.descendants() if title in _title(each)]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int, to_all: bool = False) -> float:
        """Sends the signal, to the whole foreground group as a terminal does with ``to_all``; returns the seconds it
        took to end."""
        self.family = self.descendants()
        began = time.monotonic()
        if to_all:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(STOP_S)
        return time.monotonic() - began

    def left_behind(self) -> list[str]:
        """Processes of the server that are still there."""
        _, alive = psutil.wait_procs(self.family, timeout=3.0)
        return [_title(each) for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def serving(
    *arguments: object, wait_for_ready: bool = True, settings: str = "", **more_environment: str
) -> Iterator[Server]:
    """A server that is ready, unless told not to wait. Nothing of it outlives the block."""
    with short_home() as home:
        config = home / "serve.toml"
        config.write_text(SMALL.format(dashboard_port=free_port()) + settings)
        process = subprocess.Popen(
            moestro("serve", *arguments, "--config", config),
            env=environment(home, **more_environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        server = Server(home, process)
        readers = [
            threading.Thread(target=_read, args=(pipe, lines), daemon=True)
            for pipe, lines in ((process.stderr, server.lines), (process.stdout, server.output))
        ]
        for reader in readers:
            reader.start()
        try:
            if wait_for_ready:
                until(lambda: "Ctrl-C stops" in server.text or process.poll() is not None, START_S)
                assert process.poll() is None, server.text
            yield server
        finally:
            _end(server)
            for reader in readers:
                reader.join(5.0)


def until(condition: Callable[[], bool], timeout_s: float = 10.0, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(every_s)


def _read(pipe: IO[str], lines: list[str]) -> None:
    for line in pipe:
        lines.append(line.rstrip("\n"))


def _end(server: Server) -> None:
    """What a test has left; only processes of this server."""
    if server.process.poll() is None:
        server.family = server.descendants()
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    for each in server.family:
        if each.is_running():
            each.kill()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""
