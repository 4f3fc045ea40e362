"""Some hundreds of seeds of the whole cluster; ``make simulate`` runs ten thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.cluster.simulation.run import simulate

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_every_invariant_holds(first: int) -> None:
    for seed in range(first, first + 20):
        simulate(seed)  # what fails says its seed, and how to replay it


def test_a_seed_replays_exactly_in_another_process() -> None:
    """Whatever the hashes of strings and the addresses of objects are there."""
    seed = 12
    command = [sys.executable, "-m", "moestro.cluster.simulation", "--seed", str(seed)]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert simulate(seed).digest() in told
