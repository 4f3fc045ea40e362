"""Captured steps in a group of real processes: ranks that replay and ranks that compute eagerly in one step."""

from __future__ import annotations

import pytest
from tests.distributed.processes import run_processes


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (2, 2)])
def test_replays_and_eager_steps_meet_in_the_same_collectives(dp, tp):
    """Ranks start idle, prefill while others decode, and experts change slots in between, with replicas: the tokens are
    those of one rank that holds everything, and every row is counted once."""
    ranks = run_processes("tests.distributed.captured_ranks:serve", dp * tp, {"dp": dp, "tp": tp}, timeout_s=120)
    for told, replayed, beside, _, _, alone in ranks:
        assert told == alone or tp > 1  # another tensor-parallel size may change a bit
        assert sorted(told) == sorted(alone)
        assert replayed >= 10
        assert beside <= 20
    assert any(beside for _, _, beside, *_ in ranks), "no rank computed eagerly beside a replay"
    tokens = sum(tokens for _, _, _, tokens, _, _ in ranks) // tp
    per_layer = zip(*(rows for *_, rows, _ in ranks), strict=True)
    assert [sum(layer) for layer in per_layer] == [3 * tokens] * 2, "three experts a token, padding not counted"
    if tp > 1:
        assert ranks[0][0] == ranks[1][0]
        assert ranks[2][0] == ranks[3][0]
