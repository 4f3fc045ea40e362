"""How many experts a rank's memory holds, and how many ranks a group can lose."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from benchmarks.small_models import make_model, save_model

from moestro.protos.errors import ExpertsDoNotFit
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.loading import load_share
from moestro.workers.memory_plan import MemoryPlan, capacity_of, spare_ranks
from moestro.workers.memory_use import HEADROOM, most_slots
from moestro.workers.model.decoder import Decoder


def test_slots_are_what_fits_beside_everything_else() -> None:
    assert MemoryPlan(limit=1000, fixed=400, slot=100).slots == 6
    assert MemoryPlan(limit=999, fixed=400, slot=100).slots == 5
    assert MemoryPlan(limit=300, fixed=400, slot=100).slots == 0
    assert MemoryPlan(limit=300, fixed=400, slot=0).slots == 0


@pytest.mark.parametrize(
    ("redundant", "num_ranks", "most_slots", "capacity"),
    [(0, 4, 64, 16), (0, 3, 64, 22), (8, 4, 64, 18), (8, 3, 23, 23), (8, 3, 22, 22), (64, 1, 99, 64)],
)
def test_capacity(redundant: int, num_ranks: int, most_slots: int, capacity: int) -> None:
    assert capacity_of(64, redundant, num_ranks, most_slots) == capacity


def test_too_few_ranks_are_refused_with_the_numbers() -> None:
    with pytest.raises(ExpertsDoNotFit, match=r"3 ranks are too few for 64 experts .* hold 22, and has memory for 21"):
        capacity_of(64, 8, 3, 21)


@pytest.mark.parametrize(
    ("num_ranks", "tp", "most_slots", "spare"),
    [(4, 1, 64, 3), (4, 1, 32, 2), (4, 1, 22, 1), (4, 1, 21, 0), (4, 2, 32, 2), (4, 2, 31, 0), (4, 4, 16, 0)],
)
def test_spare_ranks(num_ranks: int, tp: int, most_slots: int, spare: int) -> None:
    """Of 64 experts. As many ranks can be lost as ``capacity_of`` then accepts, in whole sets."""
    assert spare_ranks(64, num_ranks, tp, most_slots) == spare
    capacity_of(64, 0, num_ranks - spare, most_slots)
    if num_ranks - spare > tp:
        with pytest.raises(ExpertsDoNotFit):
            capacity_of(64, 0, num_ranks - spare - tp, most_slots)


def test_a_dense_model_needs_one_set() -> None:
    assert spare_ranks(0, 6, 2, 0) == 4


def share(tmp_path: Path) -> tuple[Decoder, int]:
    """Of eight experts three, and the bytes of one in both layers."""
    checkpoint = open_checkpoint(save_model(make_model("qwen3_moe", seed=3), tmp_path))
    model = load_share(checkpoint, [(0, 1, 2)] * 2)
    return model, 2 * next(iter(model.banks.values())).experts.shape.num_bytes


def test_what_a_rank_uses_now_is_measured_and_what_it_has_read_fits_anyhow(tmp_path: Path) -> None:
    model, slot = share(tmp_path)
    cpu, cache = torch.device("cpu"), 2**20
    used = psutil.Process().memory_info().rss
    roomy = int((used + cache + 1000 * slot) / (1 - HEADROOM))
    assert most_slots(model, cpu, cache, roomy, 1) == pytest.approx(1003, abs=100)
    assert most_slots(model, cpu, cache, 2**20, 1) == 3
    assert most_slots(model, cpu, cache, 0, 1) > most_slots(model, cpu, cache, 0, 2) > 1000
