"""The parts of a rebalancer, each against a definition or another implementation."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.router.placement import EMPTY, Placement, spread
from moestro.router.rebalance.config import Config
from moestro.router.rebalance.cost_model import Prices, excess_rows, fewer_rows, measure
from moestro.router.rebalance.fit import Learned, compare, fit
from moestro.router.rebalance.ledger import KEPT, Ledger, Outcome, Trigger
from moestro.router.rebalance.memory import Memory
from moestro.router.rebalance.messages import Observation
from moestro.router.rebalance.tables import bytes_to_load, loads_by_expert, rows_by_rank, tabulate
from moestro.router.rebalance.window import Bucket, Window

REPLICATED = Placement(4, ((0, 1, EMPTY), (2, 3, 0), (0, 3, 2)))
SEED = 20261121


def bucket(loads_LE: np.ndarray, seconds: float = 1.0, **changes: object) -> Bucket:
    plain = Bucket(0.0, seconds, loads_LE, np.zeros(2, np.int64), 0.0, 1, 1, 0.1, np.zeros(2), 0.0, 0)
    return replace(plain, **changes)


def observation(now: float, rows_LRC: np.ndarray) -> Observation:
    ranks = rows_LRC.shape[1]
    return Observation(
        now, 1, rows_LRC, np.ones(ranks, np.int64), *(np.full(ranks, s) for s in (0.1, 0.05, 0.01)),
        np.zeros(ranks, np.int64), np.zeros(ranks),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window_s", 0, "window_s must be finite and above 0, got 0"),
        ("bytes_per_s", math.inf, "bytes_per_s must be finite and above 0, got inf"),
        ("min_gain", -0.1, "min_gain must be finite and at least 0, got -0.1"),
        ("min_gain", 1, "min_gain must be below 1, got 1"),
    ],
)
def test_config_names_the_field_the_bound_and_the_value(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})


def test_replicas_share_rows_equally_and_empty_slots_get_none() -> None:
    tables = tabulate([REPLICATED, Placement(4, ((0, 1, 2), (3, EMPTY, EMPTY), (EMPTY, 0, EMPTY)))])
    loads_BLE = np.array([[[9, 1, 4, 6], [2, 1, 1, 5]]])
    expected = [[[3 + 1, 2 + 3 + 3, 3 + 3 + 2], [1 + 1 + 1, 5, 1]]]
    assert rows_by_rank(tables, loads_BLE).tolist() == expected


def test_rows_by_slot_become_loads_by_expert() -> None:
    rows_LRC = np.array([[[3, 1, 0], [2, 4, 2], [4, 2, 2]]])
    assert loads_by_expert(tabulate([REPLICATED]), rows_LRC).tolist() == [[3 + 2 + 4, 1, 2 + 2, 4 + 2]]
    rows_LRC[0, 0, 2] = 1
    with pytest.raises(ValueError, match="an empty slot computed rows"):
        loads_by_expert(tabulate([REPLICATED]), rows_LRC)
    with pytest.raises(ValueError, match=r"must have shape \(1, 3, 3\), got \(1, 3, 2\)"):
        loads_by_expert(tabulate([REPLICATED]), rows_LRC[..., :2])


def test_only_slots_that_get_another_expert_load() -> None:
    new = Placement(4, ((0, 1, 3), (2, EMPTY, 0), (1, 3, 0)))
    assert bytes_to_load(REPLICATED, new, 10).tolist() == [10, 0, 20]
    assert bytes_to_load(REPLICATED, REPLICATED, 10).tolist() == [0, 0, 0]


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 4000), st.floats(0, 10)), min_size=4, max_size=30, unique=True
    )
)
def test_fit_is_non_negative_least_squares(samples: list[tuple[int, int, float]]) -> None:
    line = fit(samples)
    a = np.array([[n, x] for n, x, _ in samples], dtype=float)
    y = np.array([y for _, _, y in samples])
    if not a[:, 1].any():
        assert line is None
        return
    assert line is not None
    assert line.per_step >= 0
    assert line.per_unit >= 0

    def squares(c: float, s: float) -> float:
        return float(((y - a @ [c, s]) ** 2).sum())

    free, *_ = np.linalg.lstsq(a, y, rcond=None)
    edges = [(max(0.0, a[:, 0] @ y / (a[:, 0] @ a[:, 0])), 0.0), (0.0, max(0.0, a[:, 1] @ y / (a[:, 1] @ a[:, 1])))]
    best = min(squares(*p) for p in [*edges, *([tuple(free)] if (free >= 0).all() else [])])
    assert squares(line.per_step, line.per_unit) <= best * (1 + 1e-6) + 1e-9


def test_fit_wants_four_samples_and_puts_what_it_cannot_tell_apart_on_the_units() -> None:
    assert fit([(1, 2, 3)] * 3) is None
    line = fit([(8, 16, 4.0), (4, 8, 2.0), (2, 4, 1.0), (1, 2, 0.5)])
    assert line is not None
    assert (line.per_step, line.per_unit) == (0, 0.25)


def test_a_change_is_only_as_sure_as_the_samples_are_quiet() -> None:
    random = np.random.default_rng(SEED)

    def samples(factor: float, spread: float) -> list[tuple[float, float, float]]:
        units = random.integers(100, 400, 16)
        return [(8, float(x), (0.08 + 1e-3 * x) * (factor + spread * random.standard_normal())) for x in units]

    quiet, noisy = fit(samples(1, 0.001)), fit(samples(1, 0.3))
    assert quiet is not None
    assert noisy is not None
    change = compare(quiet, samples(1.2, 0.001))
    assert change is not None
    assert change.fraction == pytest.approx(0.2, abs=0.005)
    assert change.noise < 0.01
    unsure = compare(noisy, samples(1.2, 0.3))
    assert unsure is not None
    assert unsure.noise > 0.15
    assert compare(quiet, samples(1, 0)[:3]) is None


def test_a_line_is_unsure_where_it_was_not_measured() -> None:
    """Leverage against its definition, x (X'X)^-1 x."""
    samples = [(8.0, x, 0.1 + x) for x in (100.0, 110.0, 120.0, 105.0)]
    line = fit(samples)
    assert line is not None
    x_S2 = np.array(samples)[:, :2]
    for at in ([8.0, 108.0], [8.0, 1000.0], [0.0, 50.0]):
        want = np.array(at) @ np.linalg.inv(x_S2.T @ x_S2) @ np.array(at)
        assert line.leverage(*at) == pytest.approx(want, rel=1e-6)
    assert line.leverage(8, 1000) > 100 * line.leverage(8, 108)
    one = fit([(n, 2.0 * n, 1.0 * n) for n in (1.0, 2.0, 3.0, 4.0)])
    assert one is not None
    assert one.leverage(5, 10) == pytest.approx(100 / (4 * 30))


def test_what_was_learnt_outweighs_the_guess_and_fades() -> None:
    price = Learned(guess=1.0, fades_s=100)
    assert price.value(5) == 1
    price.add(30, 10, now=0)
    assert price.value(0) == pytest.approx(2)  # the guess weighs as much as one measurement
    for _ in range(20):
        price.add(30, 10, now=0)
    assert price.value(0) == pytest.approx(2.6, rel=1e-3)  # as much as four at last
    assert price.value(100) == pytest.approx((1 + 2 * 3) / 3, rel=0.01)
    assert price.value(1e6) == pytest.approx(1, abs=1e-3)
    for _ in range(20):
        price.add(-50, 10, now=0)
    assert price.value(0) == pytest.approx(0.2, rel=0.01)  # noise may say that loading speeds steps up


def test_the_busiest_rank_counts_not_the_sum() -> None:
    old = tabulate([spread(4, 2)])
    new = tabulate([Placement(4, ((0, 2), (1, 3)))])
    loads = [np.array([[6, 4, 1, 1]]), np.array([[6, 2, 3, 1]])]
    fewer = fewer_rows(old, new, [bucket(x) for x in loads], [0])
    assert fewer.mean_L.tolist() == [(10 + 8) - (7 + 9)]
    assert fewer.surely_L.tolist() == [2 - 2 * math.sqrt(((3 - 1) ** 2 + (-1 - 1) ** 2) * 2 / 1)]


def test_chance_is_not_taken_for_skew() -> None:
    """The rank that happened to have most is no heavier in other traffic; the naive measure says it is."""
    random = np.random.default_rng(SEED)
    tables = tabulate([spread(16, 8)] * 4)
    total = 50 * 16 * 4
    naive, ours = [], []
    for _ in range(50):
        even = [bucket(random.multinomial(50, np.full(16, 1 / 16), size=4)) for _ in range(16)]
        rows_LR = rows_by_rank(tables, np.array([b.loads_LE for b in even])).sum(0)
        naive.append(float((rows_LR.max(1) - rows_LR.mean(1)).sum()))
        ours.append(excess_rows(tables, even))
    assert np.mean(naive) > 0.01 * total
    assert abs(np.mean(ours)) < 0.001 * total
    popularity = np.r_[np.full(2, 0.2), np.full(14, 0.6 / 14)]
    skew = [bucket(random.multinomial(50, popularity, size=4)) for _ in range(16)]
    assert excess_rows(tables, skew) == pytest.approx((0.4 - 1 / 8) * total, rel=0.1)


def test_a_row_is_worth_what_it_takes_and_no_more_than_was_waited_for() -> None:
    def seen(waiting_s: float) -> list[Bucket]:
        rows = [(100, 40), (80, 60), (120, 30), (90, 90)]
        return [
            bucket(np.zeros((1, 4), np.int64), rows_R=np.array(r), excess_rows=max(r) - sum(r) / 2, steps=2,
                   experts_s_R=0.01 * 2 + 1e-3 * np.array(r), waiting_s=waiting_s * (max(r) - sum(r) / 2) * 1e-3)
            for r in rows
        ]  # fmt: skip

    assert measure(seen(1.5)).s_per_row == pytest.approx(1e-3)
    assert measure(seen(0.25)).s_per_row == pytest.approx(0.25e-3)
    assert measure([]).s_per_row == 0
    assert measure(seen(1)).wall_s == 4


def test_gain_starts_when_loading_ends() -> None:
    prices = Prices(slowdown_s_per_byte=1e-9, stall_s=0.01, bytes_per_s=1e6, horizon_s=100)
    assert prices.cost_s(5_000_000) == pytest.approx(0.015)
    assert prices.saved_s(0.5, 10_000_000) == pytest.approx(0.5 * 90)
    assert prices.saved_s(0.5, 200_000_000) == 0


@given(st.lists(st.tuples(st.floats(0.01, 30), st.integers(0, 50)), max_size=60), st.sets(st.integers(0, 59)))
def test_the_window_holds_the_last_seconds_whole_and_in_few_buckets(
    steps: list[tuple[float, int]], cuts: set[int]
) -> None:
    tables, window, now, seen = tabulate([spread(2, 2)]), Window(10.0, (1, 2)), 0.0, []
    for number, (gap, rows) in enumerate(steps):
        now += gap
        rows_LRC = np.array([[[rows], [2 * rows]]])
        window.add(observation(now, rows_LRC), loads_by_expert(tables, rows_LRC), np.ones(2))
        if number:
            seen.append((now, rows))
        if number in cuts:
            window.cut()
        closed = list(window.closed)
        assert window.loads_LE.tolist() == np.sum([b.loads_LE for b in closed] or [[[0, 0]]], axis=0).tolist()
        assert all(b.end > now - 10 for b in closed)
        assert all(a.end <= b.start for a, b in pairwise(closed))
        assert all(b.seconds <= 10 for b in closed)
        assert len(closed) <= 17 + len(cuts)
        if closed:
            inside = [r for at, r in seen if closed[0].start < at <= closed[-1].end]
            assert window.loads_LE[0, 0] == sum(inside)


def test_time_must_not_run_backwards() -> None:
    rows_LRC = np.array([[[1], [1]]])
    window = Window(10.0, (1, 2))
    window.add(observation(5, rows_LRC), rows_LRC[:, :, 0], np.ones(2))
    with pytest.raises(ValueError, match=r"now must not run backwards: 4 after 5"):
        window.add(observation(4, rows_LRC), rows_LRC[:, :, 0], np.ones(2))


def test_an_observation_of_the_wrong_size_is_refused() -> None:
    good = observation(0, np.ones((1, 2, 1), np.int64))
    with pytest.raises(ValueError, match=r"tokens_R must have shape \(2,\), got \(3,\)"):
        replace(good, tokens_R=np.ones(3, np.int64))
    with pytest.raises(ValueError, match=r"steps_s_R must be finite and at least 0"):
        replace(good, steps_s_R=np.array([1, math.nan]))


def test_disappointment_doubles_the_wait_until_a_move_pays() -> None:
    memory = Memory(backoff_s=10, doublings=6)
    assert not memory.forbids(3, 1.0, now=0)
    waits = []
    for _ in range(9):
        memory.disappointed(3, 1.0, now=0)
        waits.append(next(wait for wait in range(10_000) if not memory.forbids(3, 1.9, now=wait)))
    assert waits == [10, 20, 40, 80, 160, 320, 640, 640, 640]
    assert not memory.forbids(3, 2.0, now=0)  # promises twice as much
    assert not memory.forbids(4, 1.0, now=0)
    memory.paid(3)
    assert not memory.forbids(3, 1.0, now=0)
    memory.disappointed(3, 1.0, now=0)
    assert not memory.forbids(3, 1.0, now=10)


def test_the_ledger_is_bounded_and_repeats_do_not_flood_it() -> None:
    ledger = Ledger()
    for at in range(1000):
        ledger.refuse(at, Trigger.AUTO, "nothing to gain", f"reason {at}")
        ledger.refuse(at, Trigger.AUTO, "would not pay", "dear")
    first, second = ledger
    assert (first.at, first.last_at, first.times, first.reason) == (0, 999, 1000, "reason 999")
    assert second.times == 1000
    for at in range(KEPT + 10):
        number = ledger.load(at, Trigger.AUTO, 1, "why", bytes=7, cost_s=0.5, predicted_s=2)
        ledger.switched(number)
        ledger.realised(number, 1.5)
        ledger.realised(number, -0.5)
        ledger.ended(number, Outcome.UNDONE, "no good")
    ledger.realised(0, 1.0)  # long forgotten, still counted
    entries = list(ledger)
    assert len(entries) == KEPT
    assert entries[-1].realised_s == 1
    assert (ledger.totals.moves, ledger.totals.undone, ledger.totals.bytes) == (266, 266, 266 * 7)
    assert ledger.totals.realised_s == 267
    assert ledger.totals.decisions == 2266
