"""The engines that are running for one checkpoint. One that fails is out, with its reason; the others go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.peers.process import Memory, Turn, Worker, WorkerFailed
from benchmarks.peers.quiet import Patience, quietest


class Field:
    """Workers by name, in the order they were started; ``failures`` holds why each missing one is missing."""

    def __init__(self, patience: Patience, failures: Mapping[str, str] | None = None) -> None:
        self.failures: dict[str, str] = dict(failures or {})
        self._patience = patience
        self._workers: dict[str, Worker] = {}

    @property
    def names(self) -> list[str]:
        return list(self._workers)

    def start(self, name: str, make: Callable[[], Worker], load: Mapping[str, Any], timeout_s: float) -> None:
        """Starts an engine and has it load; failing is noted, not raised."""
        try:
            worker = make()
            worker.ask(load, timeout_s)
        except (OSError, WorkerFailed) as error:
            self.failures[name] = f"did not start: {error}"
            return
        self._workers[name] = worker

    def ask(self, name: str, request: Mapping[str, Any], timeout_s: float) -> Turn | None:
        """The engine's turn, again if it was disturbed; None when it is out or fails now."""
        worker = self._workers.get(name)
        if worker is None:
            return None
        try:
            return quietest(lambda: worker.ask(request, timeout_s), self._patience)
        except WorkerFailed as error:
            self._drop(name, f"failed at {request['op']}: {error}")
            return None

    def memory(self) -> dict[str, Memory]:
        result = {}
        for name, worker in list(self._workers.items()):
            try:
                result[name] = worker.memory()
            except WorkerFailed as error:
                self._drop(name, f"between turns: {error}")
        return result

    def _drop(self, name: str, reason: str) -> None:
        del self._workers[name]
        self.failures[name] = reason

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
