"""The parent's side of a worker: a process group of its own, a request and an answer at a time.

Between its turns every process of a worker is stopped (SIGSTOP), so that no thread pool that spins at a barrier takes a
core from the engine that is being measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


class WorkerFailed(Exception):
    """The engine said no, died, or did not answer in time. The worker is gone."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer, and how many cores others kept busy meanwhile: what to doubt a figure by."""

    answer: dict[str, Any]
    others_cores: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes over all processes of a worker. ``resident`` counts mapped pages of weight files too."""

    resident: int
    peak: int


class Worker:
    """A running worker. ``log`` receives all that the engine prints."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._rest = b""
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env=dict(environment),
                process_group=0,  # not a session: the priority of the one that measures holds for its workers
            )
        self._stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Turn:
        """The answer to ``request``. Raises WorkerFailed, after ending the worker, if it is not a good one in time."""
        start, others = time.monotonic(), self._others_s()
        try:
            with self._awake():
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                answer: dict[str, Any] = json.loads(self._line(start + timeout_s))
            if not answer.pop("ok"):
                raise WorkerFailed(answer["error"])
            return Turn(answer, max(0.0, self._others_s() - others) / (time.monotonic() - start))
        except (OSError, ValueError) as error:
            self.kill()
            raise WorkerFailed(f"{error}: {self._last_words()}") from error
        except WorkerFailed:
            self.kill()
            raise

    def memory(self) -> Memory:
        """Of the worker while it is stopped. Raises WorkerFailed when it is gone."""
        if self._process.poll() is not None:
            raise WorkerFailed(f"ended with status {self._process.returncode}: {self._last_words()}")
        return sum_memory([self.pid, *(child.pid for child in self._children())])

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the worker, by force if it does not want to."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired), self._awake():
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"op": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _line(self, deadline: float) -> bytes:
        """The next line of stdout. Raises OSError when there is none in time, or ever."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError("no answer in time")
                chunk = os.read(descriptor, 1 << 20)
                if not chunk:
                    raise OSError(f"the worker ended with status {self._process.wait()}")
                self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def _others_s(self) -> float:
        """Core seconds since boot that were not this worker's own."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        with contextlib.suppress(psutil.Error):
            busy -= sum(psutil.Process(self.pid).cpu_times()[:4])
        return float(busy)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it printed nothing"


def sum_memory(pids: Sequence[int]) -> Memory:
    """From /proc; peaks of several processes are added as if they had come together."""
    fields = [_status(pid) for pid in pids]
    return Memory(sum(each["VmRSS"] for each in fields), sum(each["VmHWM"] for each in fields))


def _status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}
