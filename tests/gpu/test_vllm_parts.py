"""A wheel goes in parts and comes back, but for what is left out."""

from __future__ import annotations

import random
import zipfile

import pytest
from benchmarks.gpu_suite.vllm_parts import join, split


def test_a_wheel_survives_its_parts(tmp_path):
    noise = random.Random(1).randbytes(5000)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "x = 1\n")
        wheel.writestr("vllm/_moe_C.so", noise)
        wheel.writestr("vllm/vllm_flash_attn/_vllm_fa2_C.so", noise)
    parts = split(tmp_path / "a.whl", tmp_path / "parts", part_bytes=2000)
    assert len(parts) == 3
    join(tmp_path / "parts", tmp_path / "out")
    assert (tmp_path / "out/vllm/_moe_C.so").read_bytes() == noise
    assert (tmp_path / "out/vllm/__init__.py").read_text() == "x = 1\n"
    assert not (tmp_path / "out/vllm/vllm_flash_attn").exists()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match="some are missing"):
        join(tmp_path / "parts", tmp_path / "again")
