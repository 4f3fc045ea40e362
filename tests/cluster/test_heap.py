"""What a process that must not pause needs of Python."""

from __future__ import annotations

import os
import subprocess
import sys

FROZEN = """
import gc
import torch
from moestro.cluster.heap import freeze_heap
assert len(gc.get_objects()) > 50_000
freeze_heap()
print(len(gc.get_objects()))
"""


def test_a_collection_walks_nothing_that_was_there_before() -> None:
    """In a process of its own: the switch is for the whole of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 100
