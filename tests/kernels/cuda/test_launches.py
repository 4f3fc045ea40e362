"""The launches of a step as they would be on a GPU: how many, with arguments that Triton takes, and compiled once per
bucket and not per size."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cuda.hopper import launches_for_hopper

from moestro.kernels.cuda.experts import make_cuda_experts
from moestro.kernels.cuda.gate import route
from moestro.kernels.cuda.linear import CudaLinear
from moestro.kernels.gate import GateSpec
from moestro.kernels.grouped_experts import ExpertShape


def launched(launches):
    names = [launch.kernel.removesuffix("_kernel") for launch in launches]
    binaries = {id(launch.binary) for launch in launches}
    launches.clear()
    return names, binaries


def test_a_mixture(monkeypatch):
    shape = ExpertShape(64, 128, torch.bfloat16, torch.device("cpu"))
    experts = make_cuda_experts(shape, [None] * 16)
    x_TD = torch.zeros(60, 128, dtype=torch.bfloat16)
    slots_TK, weights_TK = torch.zeros(60, 4, dtype=torch.int64), torch.zeros(60, 4)

    def mix(num_tokens):
        experts.mix(x_TD[:num_tokens], slots_TK[:num_tokens], weights_TK[:num_tokens])

    with launches_for_hopper(monkeypatch) as launches:
        mix(1)
        few, few_binaries = launched(launches)
        mix(3)
        assert launched(launches) == (few, few_binaries)
        assert few == ["gate_up", "down"]
        mix(33)
        many, many_binaries = launched(launches)
        mix(60)
        assert launched(launches) == (many, many_binaries)
        assert many == ["count", "place", "gate_up", "down", "sum"]
        experts.apply(x_TD, torch.zeros(16, dtype=torch.int64))
        assert launched(launches)[0] == ["tiles", "gate_up", "down"]


def test_a_linear_and_a_gate(monkeypatch):
    linear = CudaLinear(torch.zeros(64, 1024, dtype=torch.bfloat16))
    x_TI = torch.zeros(40, 1024, dtype=torch.bfloat16)
    with launches_for_hopper(monkeypatch) as launches:
        linear.apply(x_TI[:33])
        once = launched(launches)
        assert once[0] == ["linear"]
        linear.apply(x_TI)
        assert launched(launches) == once
        logits_TE = torch.zeros(5, 32, dtype=torch.bfloat16)
        route(logits_TE, None, GateSpec(32, 4, True))
        assert launched(launches)[0] == ["gate"]
