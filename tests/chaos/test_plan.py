"""What the chaos harness asks and breaks follows from its seed alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from benchmarks.chaos.inject import choose
from benchmarks.chaos.plan import LASTS_S, Fault, Kind, faults
from benchmarks.chaos.requests import How, Mix, build_pool, turns
from benchmarks.chaos.system import NotNow, Role, Target

from moestro.cluster.client_results import ModelInfo

MODEL = ModelInfo("m", "Qwen3Moe", 2048, 4096, "bfloat16", has_chat_template=True)
TEXTS = [[1, 2, 3, 4], list(range(100))]


def test_the_same_seed_is_the_same_run() -> None:
    kinds = list(Kind)
    assert list(islice(faults(3, kinds), 50)) == list(islice(faults(3, kinds), 50))
    assert list(islice(faults(3, kinds), 50)) != list(islice(faults(4, kinds), 50))
    pool = build_pool(MODEL, TEXTS, 20, 3, Mix())
    assert pool == build_pool(MODEL, TEXTS, 20, 3, Mix())
    assert list(islice(turns(pool, 3, 0, Mix()), 50)) == list(islice(turns(pool, 3, 0, Mix()), 50))
    assert list(islice(turns(pool, 3, 0, Mix()), 50)) != list(islice(turns(pool, 3, 1, Mix()), 50))


def test_every_kind_comes_and_lasts_as_it_should() -> None:
    drawn = list(islice(faults(0, list(Kind)), 400))
    assert {fault.kind for fault in drawn} == set(Kind)
    assert {each.kind for each in islice(faults(0, [Kind.KILL_RANK, Kind.STOP_RANK]), 50)} == {
        Kind.KILL_RANK,
        Kind.STOP_RANK,
    }
    for fault in drawn:
        shortest, longest = LASTS_S.get(fault.kind, (0.0, 0.0))
        assert shortest <= fault.lasts_s <= longest
    assert not drawn[0].impatient


def test_requests_are_of_every_kind_and_fit_the_model() -> None:
    pool = build_pool(MODEL, TEXTS, 40, 0, Mix())
    assert any(isinstance(case.prompt, str) for case in pool)
    for case in pool:
        if not isinstance(case.prompt, str):
            assert len(case.prompt) + case.options["max_tokens"] < MODEL.max_context
            assert all(0 <= token < MODEL.vocab_size for token in case.prompt)
    assert {turn.how for turn in islice(turns(pool, 0, 0, Mix()), 200)} == set(How)


def test_a_fault_hits_whom_its_draw_says_and_leaves_one() -> None:
    ranks = [Target(Role.RANK, f"rank {number}", number) for number in range(3)]
    kill = Fault(0, Kind.KILL_RANK, 1.0, False, draw=0.99)
    assert choose(kill, ranks) == [ranks[2]]
    assert choose(Fault(0, Kind.KILL_TWO_RANKS, 1.0, False, draw=0.99), ranks) == [ranks[2], ranks[0]]
    for too_few, fault in ((ranks[:1], kill), (ranks[:2], replace(kill, kind=Kind.KILL_TWO_RANKS)), ([], kill)):
        with pytest.raises(NotNow):
            choose(fault, too_few)
    sets = [Target(Role.RANK, f"rank {number}", number, unit=f"set {number // 2}") for number in range(4)]
    assert choose(kill, sets) == [sets[3]]
    with pytest.raises(NotNow):  # the peer alone is of no use
        choose(kill, sets[2:])
    gateway = Target(Role.GATEWAY, "gateway 0", 9)
    assert choose(Fault(0, Kind.KILL_GATEWAY, 1.0, False, draw=0.5), [gateway]) == [gateway]
