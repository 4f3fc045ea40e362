"""Starts processes, and starts them again when they end: what Ray Serve does for deployments."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Part:
    """One process to be kept. ``again_s``: how long after its end it is started again."""

    role: str
    name: str
    command: Sequence[str]
    again_s: float = 0.5


class Keeper:
    """Keeps them while the block runs, from a thread. Standard output and error of all go to one log."""

    def __init__(self, parts: Sequence[Part], folder: Path, log: IO[str]) -> None:
        self._parts, self._folder, self._log = parts, folder, log
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(part,), daemon=True) for part in parts]

    def alive(self, role: str) -> list[tuple[str, int]]:
        """Names and process ids, in the order in which they were named."""
        with self._lock:
            found = [(part.name, self._running.get(part.name)) for part in self._parts if part.role == role]
        return [(name, process.pid) for name, process in found if process is not None and process.poll() is None]

    def __enter__(self) -> Keeper:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        with self._lock:
            for process in self._running.values():
                with suppress(ProcessLookupError):
                    process.terminate()
        for thread in self._threads:
            thread.join()

    def _keep(self, part: Part) -> None:
        while not self._stopping.is_set():
            with self._lock:
                process = subprocess.Popen(
                    list(part.command), cwd=self._folder, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
                )
                self._running[part.name] = process
            while process.poll() is None:
                if self._stopping.wait(LOOK_S):
                    _end(process)
            self._stopping.wait(part.again_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
