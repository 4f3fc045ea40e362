"""Every transport in real processes: equal to the dense reference, and to the bit what one rank computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.small_models import make_model, save_model
from tests.distributed.processes import run_processes
from tests.distributed.transport_ranks import KINDS
from tests.router.cases import CASES

RANKS = "tests.distributed.transport_ranks"
SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
NUM_SEEDS = 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_over_ranks_is_that_of_one_rank(kind: str) -> None:
    """The table of cases, spread and replicated, two odd placements, and random layers; a failure names its seed."""
    arguments = {"shapes": SHAPES, "kind": kind, "num_seeds": NUM_SEEDS}
    compared = run_processes(f"{RANKS}:check", 4, arguments, timeout_s=120)
    assert compared == [
        [2 * len(CASES) + 2 + NUM_SEEDS] * sum(dp * tp > rank for dp, tp in SHAPES) for rank in range(4)
    ]


def test_a_rank_that_sends_other_than_it_said_is_told() -> None:
    assert run_processes(f"{RANKS}:check_refusals", 2) == [len(KINDS)] * 2


def test_a_mixture_layer_in_halves_is_the_layer_at_once(tmp_path: Path) -> None:
    """With a shared expert, by every kind, tokens uneven over ranks: the bits of one rank that holds all experts."""
    save_model(make_model("qwen2_moe", seed=7), tmp_path)
    results = run_processes(f"{RANKS}:check_mixture_layer", 3, {"model": str(tmp_path)})
    kinds = ["shared_memory", "all_to_all", "fixed_capacity", "gather_scatter", "none"]
    assert [result["kinds"] for result in results] == [kinds] * 3
    for result in results:
        assert result["dispatches"] == {"1": 1, "2": 2}, "halves were meant to be two dispatches"
        assert 0 < result["wait_s"] < 30
        assert 0 < result["compute_s"] < 30


def test_rows_travel_while_the_caller_computes() -> None:
    """Rank 1 comes a second late: rank 0 is back from dispatch long before, and waits in the arrival."""
    (sent_s, arrived_s), _ = run_processes(f"{RANKS}:overlap", 2)
    assert sent_s < 0.5, "dispatch waited for its peer"
    assert arrived_s > 0.25, "the peer was meant to be late"


def test_sums_and_gathers_of_tensor_parallel_sets() -> None:
    run_processes(f"{RANKS}:check_tensor_parallel", 4)


def test_epochs_are_apart() -> None:
    assert run_processes(f"{RANKS}:check_epochs", 2) == [[[0, 1]] * 3] * 2
