"""When the cuda backend is chosen, and that Triton stays out of processes that do not use it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moestro.kernels.choose import choose_backend

CUDA = torch.device("cuda", 0)


def test_a_hopper_serves_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend(CUDA, torch.bfloat16).backend.name == "cuda"
    assert choose_backend(CUDA, torch.bfloat16, "plain").backend.name == "plain"
    chosen = choose_backend(CUDA, torch.float32)
    assert (chosen.backend.name, chosen.reason) == ("plain", "not cuda: the weights are float32 and not bfloat16")


def test_an_older_device_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    chosen = choose_backend(CUDA, torch.bfloat16)
    assert chosen.backend.name == "plain"
    assert "8.0" in chosen.reason


def test_asked_for_in_vain():
    with pytest.raises(ValueError, match="the device is cpu"):
        choose_backend(torch.device("cpu"), torch.bfloat16, "cuda")


def test_triton_is_not_imported_for_others():
    code = """
import sys, torch
from moestro.kernels.choose import choose_backend
import moestro.workers.loading
choose_backend(torch.device("cpu"), torch.float32)
assert not any(name.startswith("moestro.kernels.cuda") and name != "moestro.kernels.cuda.available"
               and name != "moestro.kernels.cuda" for name in sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
