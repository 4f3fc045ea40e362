"""What is concluded from traffic around one switch. Two ranks, four experts; a row takes 1 ms."""

import numpy as np
import pytest

from moestro.router.placement import Placement, spread
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.cost_model import Appraisal
from moestro.router.rebalance.evidence import Evidence
from moestro.router.rebalance.ledger import Ledger, Trigger
from moestro.router.rebalance.messages import Observation
from moestro.router.rebalance.plan import Job, Plan
from moestro.router.rebalance.tables import tabulate

OLD, NEW = spread(4, 2), Placement(4, ((0, 2), (1, 3)))
HOT = (60, 40, 10, 10)  # 100 against 20 under OLD, 70 against 50 under NEW
CONFIG = Config(window_s=16, backoff_s=50, load_slowdown=0.0, switch_stall_s=0.0, horizon_s=1000)


def serve(evidence: Evidence, until: float, loads: tuple[int, ...] = HOT, step_s: float = 1.0) -> None:
    while evidence.now < until:
        rows_LRC = np.array([[[loads[e] for e in experts] for experts in evidence.placements[0].slots]])
        evidence.observe(
            Observation(
                now=evidence.now + step_s,
                steps=1,
                rows_LRC=rows_LRC,
                tokens_R=np.full(2, 60),
                steps_s_R=np.full(2, 0.2),
                experts_s_R=rows_LRC.sum(axis=(0, 2)) * 1e-3,
                waiting_s_R=np.full(2, 0.1),
                loaded_bytes_R=np.zeros(2, np.int64),
                switch_s_R=np.zeros(2),
            )
        )


def moved(rate: float, cost_s: float) -> Evidence:
    """After a switch at 10 s that had promised ``rate`` and cost ``cost_s``."""
    evidence = Evidence(CONFIG, (OLD,), 100, Ledger())
    serve(evidence, 10)
    plan = Plan(Trigger.AUTO, "", (NEW,), tabulate((NEW,)), 0.0, False)
    (appraisal,) = evidence.appraise(plan, [0])
    assert appraisal.rate == pytest.approx(0.03)
    assert appraisal.bytes == 2 * appraisal.slowest_bytes == 200
    assert appraisal.saved_s == pytest.approx(0.03 * 1000, rel=1e-3)
    evidence.switch(Job(1, 0, 0, rate, cost_s, None), NEW, judged=True)
    return evidence


def another(rate: float = 0.01) -> Appraisal:
    return Appraisal(layer=0, rate=rate, saved_s=1.0, cost_s=0.0, bytes=1, slowest_bytes=1)


def test_no_bucket_spans_a_switch() -> None:
    evidence = Evidence(CONFIG, (OLD,), 100, Ledger())
    serve(evidence, 10, step_s=0.75)
    at = evidence.now
    assert evidence.window.closed[-1].end < at
    evidence.switch(Job(1, 0, 0, 0.0, 0.0, None), NEW, judged=True)
    assert evidence.window.closed[-1].end == at
    serve(evidence, at + 1.5, (0, 0, 7, 0), step_s=0.75)
    (after,) = evidence.window.since(at)
    assert after.loads_LE.tolist() == [[0, 0, 14, 0]]


def test_a_move_earns_by_the_rows_that_come() -> None:
    evidence = moved(rate=0.03, cost_s=1.0)
    serve(evidence, 20)
    assert evidence.accounts[0].earned_s == pytest.approx(10 * (100 - 70) * 1e-3)
    serve(evidence, 25, (60, 10, 40, 10))  # 70 under OLD, 100 under NEW
    assert evidence.accounts[0].earned_s == pytest.approx(5 * (100 - 70) * 1e-3)


def test_a_layer_waits_until_its_last_move_has_earned_its_cost() -> None:
    evidence = moved(rate=0.03, cost_s=0.45)
    serve(evidence, 20)
    assert not evidence.allows(another())
    serve(evidence, 26)
    assert evidence.allows(another())  # at once, for nothing disappointed


def test_a_move_that_earns_less_than_half_of_its_promise_disappoints() -> None:
    evidence = moved(rate=0.07, cost_s=10.0)
    serve(evidence, 20)
    assert not evidence.allows(another())
    assert evidence.accounts.get(0) is None
    assert evidence.allows(another(rate=0.15))
    serve(evidence, 69)
    assert not evidence.allows(another())
    serve(evidence, 70)
    assert evidence.allows(another())


def test_an_account_is_closed_at_the_horizon() -> None:
    for cost_s, free in ((1.0, True), (100.0, False)):
        evidence = moved(rate=0.03, cost_s=cost_s)
        evidence.accounts[0].settled = True
        serve(evidence, 1009)
        assert evidence.accounts.get(0) is not None
        serve(evidence, 1010)
        assert evidence.accounts.get(0) is None
        assert evidence.allows(another()) == free
