"""Loading gently leaves nothing slow behind: what computes afterwards has the priority it always had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, threading
from moestro.cluster.ranks.priority import NICER, gentle

def nice_and_time(thread):
    fields = open(f"/proc/self/task/{thread}/stat").read().rpartition(")")[2].split()
    return int(fields[16]), int(fields[11]) + int(fields[12])

def threads():
    return {int(thread): nice_and_time(thread) for thread in os.listdir("/proc/self/task")}

def load():
    global torch
    gentle()
    import torch
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    seen["loading"] = threads()[threading.get_native_id()][0]

def compute():
    for _ in range(20):
        torch.sin(torch.randn(400_000)) @ torch.randn(400_000)
    seen["after"] = threads()

usual, seen = os.getpriority(os.PRIO_PROCESS, 0), {}
for work in (load, compute):
    before = threads()
    (thread := threading.Thread(target=work)).start()
    thread.join()
assert seen["loading"] == min(usual + NICER, 19), seen
worked = {t: nice for t, (nice, spent) in seen["after"].items() if spent > before.get(t, (0, 0))[1]}
assert worked, "nothing was computed"
assert set(worked.values()) == {usual}, worked
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is a process's")
def test_the_engine_is_not_behind_after_a_gentle_load() -> None:
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
