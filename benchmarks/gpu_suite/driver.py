"""Runs parts one after the other, each in a process of its own, and writes the record after each.

A part can crash the driver of the GPU's context, hang in a collective or run out of memory; its process ends with it
and the next part starts afresh. Nothing is skipped silently: a part that did not run says why and makes the whole fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_suite.checks import Settings, why
from benchmarks.gpu_suite.parts import PARTS, Part

Record = dict[str, Any]
_LEAST_S = 5.0  # a part with less time than this is not started
_ERROR_LINES = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one part. ``reason`` says why it is not passed, beyond what its checks say."""

    part: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    checks: list[Record]
    reason: str | None = None


RunPart = Callable[[str, Settings, float], Outcome]


def run_suite(
    names: Sequence[str],
    settings: Settings,
    head: Record,
    output: Path,
    *,
    budget_s: float,
    run_part: RunPart,
    tell: Callable[[Outcome], None],
) -> bool:
    """Whether every part passed. ``output`` holds ``head`` and the outcomes so far, at any time."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    write(output, head, settings, outcomes, "running", 0.0)
    for name in names:
        left_s = budget_s - (time.monotonic() - start)
        if left_s < _LEAST_S:
            outcome = Outcome(name, "skipped", 0.0, [], f"{left_s:.0f} s of the budget of {budget_s:.0f} s were left")
        else:
            outcome = run_part(name, settings, min(left_s, PARTS[name].limit_s))
        outcomes.append(outcome)
        passed = all(one.status == "passed" for one in outcomes)
        status = "running" if len(outcomes) < len(names) else "passed" if passed else "failed"
        write(output, head, settings, outcomes, status, time.monotonic() - start)
        tell(outcome)
    return all(one.status == "passed" for one in outcomes)


def write(
    output: Path, head: Record, settings: Settings, outcomes: Sequence[Outcome], status: str, seconds: float
) -> None:
    """Replaces the file as a whole: a reader never sees half of it."""
    record = {
        "suite": "gpu_suite",
        "status": status,
        "seconds": round(seconds, 1),
        **head,
        "settings": asdict(settings),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    partial.replace(output)


def in_process_of_its_own(name: str, settings: Settings, limit_s: float) -> Outcome:
    """Starts the part's process and waits for it, at most ``limit_s``."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checks_file, log_file = Path(folder) / "checks.jsonl", Path(folder) / "log.txt"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_suite.part", name, json.dumps(asdict(settings)), checks_file],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            )
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            except BaseException:
                process.kill()
                process.wait()
                raise
        lines = checks_file.read_text().splitlines() if checks_file.exists() else []
        checks = [json.loads(line) for line in lines if line.endswith("}")]
        last_words = " | ".join(log_file.read_text(errors="replace").strip().splitlines()[-_ERROR_LINES:])
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(name, "failed", seconds, checks, f"ended after {limit_s:.0f} s; last words: {last_words}")
    if code != 0:
        return Outcome(name, "failed", seconds, checks, f"exit status {code}: {last_words}")
    return _judged(name, seconds, checks)


def in_this_process(name: str, settings: Settings, limit_s: float) -> Outcome:
    """Without isolation, for a debugger and for quick tests; the limit is not enforced."""
    part: Part = PARTS[name]
    start, checks = time.monotonic(), []
    try:
        for check in part.load()(settings):
            checks.append(check.record())
    except Exception as error:
        return Outcome(name, "failed", time.monotonic() - start, checks, why(error))
    return _judged(name, time.monotonic() - start, checks)


def _judged(name: str, seconds: float, checks: list[Record]) -> Outcome:
    if not checks:
        return Outcome(name, "failed", seconds, checks, "the part ended without a single check")
    failed = [check["name"] for check in checks if check["status"] == "failed"]
    if failed:
        return Outcome(name, "failed", seconds, checks, f"{len(failed)} of {len(checks)} checks failed")
    return Outcome(name, "passed", seconds, checks)
