"""The process of one engine: reads a request a line from stdin, answers a line on stdout; both are JSON objects.

    {"op": "load", "model": ..., "threads": ..., "max_sequences": ..., "max_length": ...}
    {"op": "batch", "prompts": [[...]], "num_output": ...}     answers a driving.Batch
    {"op": "load_test", "requests": [...]}                     answers a driving.Load
    {"op": "quit"}

Every answer has ``ok``; false comes with ``error``. What an engine prints goes to stderr: stdout is moved out of its
way before it is imported. Standard library only, besides the engine.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import fields
from typing import IO, Any

from benchmarks.peers.driving import run_batch, run_load
from benchmarks.peers.engines.port import PeerEngine, Settings


def load_engine(location: str, settings: Settings) -> PeerEngine:
    """``location`` is module:class."""
    module, name = location.split(":")
    engine: PeerEngine = getattr(importlib.import_module(module), name)(settings)
    return engine


def serve(location: str, requests: IO[str], answers: IO[str]) -> None:
    engine: PeerEngine | None = None

    def handle(request: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal engine
        match request["op"]:
            case "load":
                engine = load_engine(location, Settings(**{each.name: request[each.name] for each in fields(Settings)}))
                return {}
            case "batch":
                assert engine is not None, "load comes first"
                return run_batch(engine, request["prompts"], request["num_output"])
            case "load_test":
                assert engine is not None, "load comes first"
                return run_load(engine, request["requests"])
            case other:
                raise ValueError(f"unknown op {other!r}")

    for line in requests:
        request = json.loads(line)
        if request["op"] == "quit":
            return
        try:
            answer = {"ok": True, **handle(request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_with_parent() -> None:
    """A stopped worker cannot notice that its parent is gone; the kernel can (Linux: PR_SET_PDEATHSIG)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    serve(sys.argv[1], sys.stdin, answers)
    answers.flush()
    os._exit(0)  # an engine's own threads or exit handlers must not keep the process


if __name__ == "__main__":
    main()
