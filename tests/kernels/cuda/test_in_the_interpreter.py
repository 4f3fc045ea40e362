"""The Triton kernels, computed on the CPU. Triton decides at its first import whether it interprets or compiles, so
these tests have a process of their own. By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/cuda/interpreted``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(900)  # a minute of processor time, of which others may want their share
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    interpreting = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=HERE.parents[2], env=interpreting, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
