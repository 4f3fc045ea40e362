"""The suite's checks on a CUDA device, as tests: what ``benchmarks.gpu_suite`` runs in full, here on small sizes."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu_suite.checks import Settings
from benchmarks.gpu_suite.parts import PARTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("part", PARTS)
def test_every_check_of_a_part_passes(part):
    checks = list(PARTS[part].load()(Settings("cuda", small=True, seed=1)))
    assert checks
    assert {check.name: check.reason for check in checks if check.status != "passed"} == {}
