"""AllToAllTransport in real processes: equal to the dense reference, and to the bit what one rank computes."""

from tests.distributed.processes import run_processes
from tests.router.cases import CASES

SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]


def test_all_to_all_in_every_shape() -> None:
    results = run_processes("tests.distributed.transport_ranks:check", 4, {"shapes": SHAPES})
    for shape, result in zip(SHAPES, results[0], strict=True):
        print(f"\n(dp, tp)={shape}, median microseconds: {result['microseconds']}")
    # Two dtypes, in every shape that has the rank.
    checked = [[result["checked"] for result in of_rank] for of_rank in results]
    assert checked == [[2 * len(CASES)] * sum(dp * tp > rank for dp, tp in SHAPES) for rank in range(4)]


def test_epochs_are_apart() -> None:
    assert run_processes("tests.distributed.transport_ranks:check_epochs", 2) == [[[0, 1]] * 3] * 2
