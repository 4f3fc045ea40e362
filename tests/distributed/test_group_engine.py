"""Whole groups of real processes: every shape gives transformers' own greedy tokens, and an idle group rests."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.small_models import make_model, random_ids, save_model
from tests.distributed.processes import run_processes
from tests.kernels.cpu import needs_cpu_kernels
from tests.model.oracle import reference_greedy

SHAPES = [[1, 1], [2, 1], [1, 2], [2, 2], [4, 1]]
NUM_TOKENS = 32


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral", "dots1"])
def test_every_shape_gives_transformers_greedy_tokens(name: str, tmp_path: Path) -> None:
    model = make_model(name, seed=11)
    save_model(model, tmp_path)
    prompts = [random_ids(length, seed=length) for length in (3, 21, 8, 13, 1)]
    expected = {str(n): reference_greedy(model, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)}
    arguments = {"model": str(tmp_path), "shapes": SHAPES, "prompts": prompts, "num_tokens": NUM_TOKENS}
    ranks = run_processes("tests.distributed.group_ranks:generate", 4, arguments, timeout_s=120)
    for index, shape in enumerate(SHAPES):
        merged = {number: tokens for rank in ranks for number, tokens in rank[index].items()}
        assert merged == expected, f"dp, tp = {shape}"


def test_an_idle_group_uses_no_processor_time(tmp_path: Path) -> None:
    save_model(make_model("qwen3_moe", seed=12), tmp_path)
    ranks = run_processes("tests.distributed.group_ranks:idle_seconds", 2, {"model": str(tmp_path)}, timeout_s=90)
    assert [rank["tokens"] for rank in ranks] == [4.0, 0.0]
    assert all(rank["seconds"] < 0.1 for rank in ranks), ranks


@needs_cpu_kernels
def test_ranks_with_different_kernels_do_not_form_a_group(tmp_path: Path) -> None:
    save_model(make_model("qwen3_moe", seed=13).bfloat16(), tmp_path)
    said = run_processes(
        "tests.distributed.group_ranks:with_kernels_of_its_own", 2, {"model": str(tmp_path)}, timeout_s=90
    )
    wanted = "rank.kernels: all ranks of a group must have the same, but rank 0 has cpu and rank 1 plain"
    assert [words.partition(";")[0] for words in said] == [wanted] * 2
