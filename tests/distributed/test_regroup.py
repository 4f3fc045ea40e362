"""Real processes go from group to group with what they hold: fewer ranks, one alone, all again. The logits keep their
bits, caches are taken along, and only what nobody holds is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.small_models import make_model, random_ids, save_model
from tests.distributed.processes import run_processes
from tests.distributed.regroup_ranks import steps
from tests.kernels.cpu import needs_cpu_kernels
from tests.model.oracle import Driver

from moestro.workers.loading import load_model

PROMPT, NUM_STEPS = random_ids(7, seed=5), 3
EXPERTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("qwen3_moe", seed=3).to(torch.bfloat16)
    return save_model(model, tmp_path_factory.mktemp("model"))


def alone(folder: Path, num_steps: int) -> list[str]:
    torch.set_num_threads(1)
    return steps(Driver(load_model(folder), num_blocks=64), PROMPT, num_steps)[1]


def run(folder: Path, groups: list[list[int]], tp: int = 1) -> list[list[dict[str, Any]]]:
    arguments = {"model": str(folder), "groups": groups, "tp": tp, "prompt": PROMPT, "num_steps": NUM_STEPS}
    return run_processes("tests.distributed.regroup_ranks:through_groups", 4, arguments, timeout_s=150)


@needs_cpu_kernels
def test_shrinking_to_one_and_growing_again_changes_no_bit(folder: Path) -> None:
    groups = [[0, 1, 2, 3], [0, 2, 3], [2], [0, 1, 2, 3]]
    ranks = run(folder, groups)
    wanted = alone(folder, NUM_STEPS * len(groups))
    for told in ranks:  # who sat a group out goes on where it was
        digests = [digest for group in told for digest in group["digests"]]
        assert digests == wanted[: len(digests)]
    loaded = [[group["loaded"] for group in told] for told in ranks]
    # Of two layers: two experts are lost with rank 1; then rank 2 has two or three of eight; at last each has its own.
    assert loaded[0][1] + loaded[2][1] + loaded[3][1] == 2 * 2
    assert loaded[2][2] in (2 * (EXPERTS - 3), 2 * (EXPERTS - 2))
    assert [told[-1] for told in loaded] == [0, 0, 0, 0]
    for layer in range(2):
        assert sorted(e for told in ranks for e in told[-1]["held"][layer]) == list(range(EXPERTS))


def test_tensor_parallel_sets_come_and_go_whole(folder: Path) -> None:
    groups = [[0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]
    ranks = run(folder, groups, tp=2)
    for told in ranks[2:]:
        assert [group["digests"] for group in told] == [group["digests"] for group in ranks[2]]
    assert [group["loaded"] for group in ranks[2]] == [0, 4, 0]
    assert [group["digests"] for group in ranks[0]] == [group["digests"] for group in ranks[2]][: len(ranks[0])]
