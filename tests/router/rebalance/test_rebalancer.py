"""A rebalancer in a simulated group: it earns its moves, and nothing is ever torn."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.router.rebalance.simulation import (
    CAPACITY,
    EXPERT_BYTES,
    EXPERTS,
    LAYERS,
    QUICK,
    RANKS,
    Group,
    alternating,
    even,
    greedy,
    skewed,
)

from moestro.router.balance import Topology, balance
from moestro.router.placement import Placement, spread
from moestro.router.rebalance.ledger import Entry, Outcome, Trigger
from moestro.router.rebalance.messages import Drop, StartLoad, StartSolve, Switch
from moestro.router.rebalance.rebalancer import Rebalancer

START = (spread(EXPERTS, RANKS, CAPACITY),) * LAYERS
SEEDS = range(5)


def moves(group: Group) -> list[Entry]:
    return [entry for entry in group.machine.ledger if entry.layer is not None]


def shuffled(seed: int) -> tuple[Placement, ...]:
    random = np.random.default_rng(seed)
    return tuple(
        Placement(EXPERTS, tuple((*map(int, row), -1) for row in random.permutation(EXPERTS).reshape(RANKS, -1)))
        for _ in range(LAYERS)
    )


def step_time(group: Group, seconds: float) -> float:
    """Seconds of steps per token from here on."""
    busy_s, tokens = group.busy_s, group.tokens
    group.run(seconds)
    return (group.busy_s - busy_s) / (group.tokens - tokens)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tokens_per_step", [4, 40, 400])
def test_even_traffic_moves_no_byte_and_says_so_once(seed: int, tokens_per_step: int) -> None:
    group = Group(even, seed, tokens_per_step=tokens_per_step, noise=0.1).run(120)
    assert group.bytes_moved == 0
    assert not any(isinstance(intent, StartLoad) for intent in group.intents)
    entries = list(group.machine.ledger)
    assert len(entries) <= 3
    assert entries[0].reason.startswith("Nothing to gain")
    assert sum(entry.times for entry in entries) >= 5


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_skewed_traffic_is_evened_and_the_gain_is_as_predicted(seed: int, noise: float) -> None:
    group = Group(skewed(0), seed, noise=noise).run(150)
    assert group.loss() < 0.05
    assert [(e.outcome, e.trigger) for e in moves(group)] == [(Outcome.KEPT, Trigger.AUTO)] * LAYERS
    for entry in moves(group):
        assert entry.predicted_s > 10 * entry.cost_s
        assert entry.realised_s == pytest.approx(entry.predicted_s, rel=0.3)
        assert entry.stall_s == group.stall_s
    static = Group(skewed(0), seed, noise=noise, config=replace(QUICK, enabled=False)).run(150)
    assert static.bytes_moved == 0
    assert step_time(group, 10) < 0.75 * step_time(static, 10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weight", [0.35, 0.5])
def test_steps_of_other_sizes_are_not_taken_for_loss_or_gain(seed: int, weight: float) -> None:
    group = Group(skewed(0, weight), seed, noise=0.1)
    while group.now < 120:
        group.tokens_per_step = int(220 + 180 * np.sin(group.now / 3))
        group.gather()
    assert {entry.outcome for entry in moves(group)} == {Outcome.KEPT}
    assert group.loss() < 0.05


def test_only_layers_that_pay_move() -> None:
    group = Group(skewed(4, layers=range(1, 2))).run(60)
    assert {layer for _, layer in group.switches} == {1}
    assert group.placements[0] == group.placements[2] == START[0]


def test_layers_move_best_first() -> None:
    def uneven(now: float) -> np.ndarray:
        return np.concatenate([skewed(0, weight)(now)[:1] for weight in (0.35, 0.7, 0.5)])

    assert [layer for _, layer in Group(uneven).run(40).switches] == [1, 2, 0]


def test_a_shift_of_traffic_is_followed() -> None:
    group = Group(alternating(100, skewed(0), skewed(8, 0.8))).run(95)
    assert group.loss() < 0.05
    group.run(6)
    assert group.loss() > 0.15
    group.run(60)
    assert group.loss() < 0.08
    assert all(entry.outcome is Outcome.KEPT for entry in moves(group))


def test_nothing_moves_when_moving_costs_more_than_it_saves() -> None:
    group = Group(skewed(0), config=replace(QUICK, load_slowdown=100.0)).run(120)
    assert group.bytes_moved == 0
    refusal = next(iter(group.machine.ledger))
    assert refusal.kind == "would not pay"
    assert refusal.times >= 3
    assert "Of 3 layers 0 would pay" in refusal.reason


def test_a_plan_that_gains_too_little_is_not_begun() -> None:
    """Even loads would save a third of the step time, this solver's plan a tenth of it."""
    swapped = Placement(EXPERTS, ((4, 1, 2, 3, -1), (0, 5, 6, 7, -1), *START[0].slots[2:]))

    def timid(loads_LE: np.ndarray, previous: tuple[Placement, ...]) -> tuple[Placement, ...]:
        return (swapped,) * LAYERS

    choosy = Group(skewed(0), solve=timid, config=replace(QUICK, min_gain=0.15)).run(60)
    assert choosy.bytes_moved == 0
    assert "Of 3 layers 3 would pay, 0 of which must wait" in next(iter(choosy.machine.ledger)).reason
    assert Group(skewed(0), solve=timid).run(60).placements == (swapped,) * LAYERS


def test_nothing_moves_when_loading_outlasts_the_horizon() -> None:
    group = Group(skewed(0), config=replace(QUICK, bytes_per_s=100e3, load_slowdown=0)).run(60)
    assert group.bytes_moved == 0


def test_the_price_of_loading_is_learnt() -> None:
    """Loading slows steps sixfold here, the guess says a tenth: after a plan or two the machine knows and stops
    following a shift that earlier it would have followed."""

    def run(load_slowdown: float) -> Group:
        shifting = alternating(30, *(skewed(4 * i, 0.42) for i in range(4)))
        return Group(shifting, load_slowdown=load_slowdown, config=replace(QUICK, horizon_s=30)).run(300)

    cheap, dear = run(0.05), run(6)
    first = next(entry for entry in moves(dear) if entry.slowdown_s is not None)
    assert first.slowdown_s > 5 * first.cost_s
    later = [entry for entry in moves(dear) if entry.at > first.at + 1]
    assert all(entry.cost_s > 2 * first.cost_s for entry in later[:3])
    assert dear.bytes_moved < 0.7 * cheap.bytes_moved


def test_an_idle_group_decides_nothing() -> None:
    group = Group(lambda now: np.zeros((LAYERS, EXPERTS))).run(100)
    assert not list(group.machine.ledger)
    assert not group.intents
    assert group.machine.loads_LE.sum() == 0


def test_traffic_that_stops_while_a_plan_is_tried_moves_nothing() -> None:
    busy = skewed(0)
    group = Group(lambda now: busy(now) if now < 5.5 else np.zeros((LAYERS, EXPERTS)))
    group.run(60)
    assert any(isinstance(intent, StartSolve) for intent in group.intents)
    assert group.bytes_moved == 0
    assert [entry.kind for entry in group.machine.ledger] == ["too little traffic"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 40), st.sampled_from([0.1, 30.0]), st.floats(0, 0.2))
def test_moves_that_do_not_pay_die_out(seed: int, period_s: float, load_slowdown: float, noise: float) -> None:
    """Whatever the rhythm of the traffic: the cost of all moves and cancelled loads is at most what was earned, plus,
    for each layer, as many losing moves as a doubling backoff lets through."""
    seconds = 250
    config = replace(QUICK, load_slowdown=load_slowdown, horizon_s=60)
    group = Group(
        alternating(period_s, skewed(0), skewed(8), skewed(4, 0.7)), seed, config=config, noise=noise,
        load_slowdown=load_slowdown,
    ).run(seconds)  # fmt: skip
    totals = group.machine.ledger.totals
    dearest = max((entry.cost_s for entry in moves(group)), default=0.0)
    losing = 2 * (1 + np.log2(1 + seconds / config.backoff_s))  # a move and its undoing
    assert totals.cost_s <= max(0.0, totals.realised_s) + LAYERS * losing * dearest, f"seed {seed}"
    assert len(group.switches) <= LAYERS * seconds / (config.window_s + config.settle_s)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("period_s", [0.5, 1.0, 2.3])
def test_fast_alternation_does_not_thrash(seed: int, period_s: float) -> None:
    group = Group(alternating(period_s, skewed(0), skewed(8)), seed).run(300)
    one_plan = LAYERS * RANKS * CAPACITY * EXPERT_BYTES
    assert group.bytes_moved < 3 * one_plan
    late = [at for at, _ in group.switches if at > 150]
    assert len(late) <= LAYERS


def test_a_move_that_looked_good_and_is_slow_is_undone_and_tried_ever_more_rarely() -> None:
    def harm(placements: tuple[Placement, ...]) -> float:
        return 1.2 * sum(new != old for new, old in zip(placements, START, strict=True))

    group = Group(skewed(0), harm=harm, noise=0.02).run(1000)
    undone = [entry for entry in moves(group) if entry.outcome is Outcome.UNDONE]
    back = [entry for entry in moves(group) if entry.trigger is Trigger.UNDO]
    assert [e.layer for e in undone if e.layer == 0]
    assert sorted(e.layer for e in undone) == sorted(e.layer for e in back)
    assert all("Undone" in entry.verdict and "steps took +" in entry.verdict for entry in undone)
    assert group.placements == START or group.machine.state != "idle"
    for layer in range(LAYERS):
        tries = [entry.at for entry in undone if entry.layer == layer]
        gaps = np.diff(tries)
        assert len(tries) <= 6
        assert all(gap >= QUICK.backoff_s * 2**i for i, gap in enumerate(gaps))
    assert group.machine.ledger.totals.undone == len(undone)


def turning(now: float) -> np.ndarray:
    return skewed(0, 0.6)(now) if now < 9.5 else even(now)


def clumsy(loads_LE: np.ndarray, previous: tuple[Placement, ...]) -> tuple[Placement, ...]:
    """Spreads the hot four; in layer 0 so that the rest of the experts lie unevenly."""
    slots = ((0, 4, 5, 6, -1), (1, 7, 8, 9, -1), (2, 10, 11, 12, -1), (3, 13, 14, 15, -1))
    heavy = ((0, 4, -1, -1, -1), (1, 7, 8, 9, 5), (2, 10, 11, 12, 6), (3, 13, 14, 15, -1))
    return (Placement(EXPERTS, heavy), *(Placement(EXPERTS, slots),) * (LAYERS - 1))


def test_traffic_that_turns_against_a_move_has_it_undone() -> None:
    """Only what came after the switch counts: here the old placement was better, by the rows."""
    config = replace(QUICK, load_slowdown=0.01, switch_stall_s=0.001)
    group = Group(turning, solve=clumsy, config=config, stall_s=0.001).run(40)
    undone = [entry for entry in moves(group) if entry.outcome is Outcome.UNDONE]
    assert {entry.layer for entry in undone} == {0}
    assert all(entry.realised_s is not None for entry in undone)
    assert group.placements[0] == START[0]


def test_a_forced_request_is_carried_out_whatever_it_costs_and_left_alone() -> None:
    group = Group(even, config=replace(QUICK, load_slowdown=100.0)).run(20)
    bad = shuffled(1)
    group.obey(*(m.request(bad, "placement.json", group.now) for m in (group.machine, group.twin)))
    group.run(30)
    assert group.placements == bad
    assert [(e.outcome, e.trigger, e.reason, e.predicted_s) for e in moves(group)] == [
        (Outcome.KEPT, Trigger.OPERATOR, "placement.json.", None)
    ] * LAYERS
    assert group.machine.ledger.totals.bytes == group.bytes_moved > 0
    before = group.bytes_moved
    group.obey(*(m.request(bad, "again", group.now) for m in (group.machine, group.twin)))
    assert group.bytes_moved == before
    assert list(group.machine.ledger)[-1].reason == "Already in place: again."


def test_a_forced_request_works_without_traffic() -> None:
    group = Group(lambda now: np.zeros((LAYERS, EXPERTS))).run(2)
    group.obey(*(m.request(shuffled(2), "verify", group.now) for m in (group.machine, group.twin)))
    group.run(10)
    assert group.placements == shuffled(2)
    assert group.machine.state == "idle"


def test_a_request_that_is_not_forced_moves_only_what_pays() -> None:
    group = Group(skewed(0, layers=range(1)), config=replace(QUICK, enabled=False)).run(20)
    wanted = greedy(np.round(skewed(0)(0) * 10_000).astype(np.int64), START)
    assert all(new != old for new, old in zip(wanted, START, strict=True))
    group.obey(*(m.request(wanted, "from yesterday", group.now, force=False) for m in (group.machine, group.twin)))
    group.run(30)
    assert group.placements == (wanted[0], *START[1:])
    assert [(e.layer, e.outcome, e.trigger) for e in moves(group)] == [(0, Outcome.KEPT, Trigger.OPERATOR)]


def run_until_loading(group: Group) -> Group:
    while not isinstance(group.job, StartLoad):
        group.gather()
    return group


def test_a_request_in_the_middle_of_a_move_drops_the_layer_that_loads() -> None:
    group = run_until_loading(Group(skewed(0), late_s=1.0))
    loading = group.job
    assert isinstance(loading, StartLoad)
    group.obey(*(m.request(shuffled(3), "now this", group.now) for m in (group.machine, group.twin)))
    assert Drop(loading.ticket) in group.intents
    assert group.job.ticket != loading.ticket
    for machine in (group.machine, group.twin):
        machine.ready(loading.ticket)  # a late answer
    assert not group.machine.gather_soon
    group.run(30)
    assert group.placements[0] != START[0]
    first = moves(group)[0]
    assert first.outcome is Outcome.CANCELLED
    assert "An operator's request came first: now this" in first.verdict
    operators = [e for e in moves(group) if e.trigger is Trigger.OPERATOR]
    assert [e.outcome for e in operators] == [Outcome.KEPT] * LAYERS


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=6), st.integers(0, 50))
def test_commands_at_any_moment_leave_every_layer_old_or_new(commands: list[tuple[int, int]], seed: int) -> None:
    """``Group.obey`` checks on the way that machine, twin and group agree on every layer."""
    group = Group(alternating(10, skewed(0), skewed(8)), seed, noise=0.05, late_s=0.5)
    asked = None
    for gathers, command in commands:
        for _ in range(gathers):
            group.gather()
        pair = (group.machine, group.twin)
        if command <= 1:
            asked = shuffled(gathers)
            group.obey(*(m.request(asked, "asked", group.now) for m in pair))
        elif command == 2:
            group.obey(*(m.pause(group.now) for m in pair))
        elif command == 3:
            for machine in pair:
                machine.resume()
        elif group.job:
            ticket = group.job.ticket
            group.obey(*(m.failed(ticket, "disk gone") for m in pair))
            asked = None
    group.obey(*(m.pause(group.now) for m in (group.machine, group.twin)))
    group.run(15)
    assert group.machine.state == "idle"
    assert group.job is None
    if commands[-1][1] <= 1:
        assert group.placements == asked
    assert not [e for e in group.machine.ledger if e.outcome in (Outcome.LOADING, Outcome.SETTLING)]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_a_machine_may_be_dropped_at_any_moment(gathers: list[int]) -> None:
    group = Group(skewed(0), late_s=0.5)
    for count in gathers:
        for _ in range(count):
            group.gather()
        group.machine, group.twin = (Rebalancer(group.config, group.placements, EXPERT_BYTES) for _ in range(2))
        group.job = None
    group.run(60)
    assert group.loss() < 0.05


def test_a_layer_switches_only_when_all_ranks_are_ready_however_late() -> None:
    group = run_until_loading(Group(skewed(0), late_s=20.0))
    started = group.now
    group.run(19)
    assert not group.switches
    assert sum(isinstance(intent, StartLoad) for intent in group.intents) == 1
    group.run(5)
    assert [at >= started + 20 for at, _ in group.switches] == [True]


def test_traffic_that_turns_while_a_layer_loads_cancels_it() -> None:
    group = Group(turning, solve=clumsy, late_s=7.0).run(20)
    (cancelled,) = moves(group)
    assert cancelled.outcome is Outcome.CANCELLED
    assert "no longer makes it pay" in cancelled.verdict
    assert not group.switches
    refusals = [entry for entry in group.machine.ledger if entry.kind == "no longer pays"]
    assert sum(entry.times for entry in refusals) == LAYERS - 1  # and the rest of the plan did not even load


def test_ready_announces_itself_until_the_switch() -> None:
    group = run_until_loading(Group(skewed(0)))
    group.run(max(0.0, group.done_at - group.now))
    ticket = group.job.ticket
    group.machine.ready(ticket + 1)
    assert not group.machine.gather_soon
    group.machine.ready(ticket)
    assert group.machine.gather_soon
    group.gather()
    assert any(isinstance(intent, Switch) and intent.ticket == ticket for intent in group.intents)
    assert not group.machine.gather_soon


def test_a_failed_load_ends_the_plan_and_is_remembered() -> None:
    group = run_until_loading(Group(skewed(0)))
    ticket = group.job.ticket
    group.obey(*(m.failed(ticket, "no such file") for m in (group.machine, group.twin)))
    assert group.machine.state == "idle"
    assert moves(group)[0].verdict == "Loading failed: no such file."
    layer = moves(group)[0].layer
    group.run(20)
    assert {at for at, _ in group.switches}
    assert layer not in {switched for _, switched in group.switches}


def test_a_failed_solve_is_said_and_tried_again() -> None:
    group = Group(skewed(0))
    while not isinstance(group.job, StartSolve):
        group.gather()
    ticket = group.job.ticket
    group.obey(*(m.failed(ticket, "out of memory") for m in (group.machine, group.twin)))
    assert list(group.machine.ledger)[-1].reason == "The solver failed: out of memory."
    assert group.run(60).loss() < 0.05


def test_pausing_ends_a_plan_of_its_own_and_resuming_begins_anew() -> None:
    group = run_until_loading(Group(skewed(0), late_s=1.0))
    group.obey(*(m.pause(group.now) for m in (group.machine, group.twin)))
    assert group.machine.paused
    assert group.job is None
    group.run(40)
    assert not group.switches
    for machine in (group.machine, group.twin):
        machine.resume()
    assert group.run(80).loss() < 0.05


def test_a_solver_that_knows_nothing_better_moves_nothing() -> None:
    group = Group(skewed(0), solve=lambda loads_LE, previous: previous).run(60)
    assert group.bytes_moved == 0
    assert {entry.kind for entry in group.machine.ledger} == {"no better", "solved in vain"}


def test_solves_in_vain_become_rare_until_there_is_more_to_gain() -> None:
    tried: list[float] = []

    def idle_solver(loads_LE: np.ndarray, previous: tuple[Placement, ...]) -> tuple[Placement, ...]:
        tried.append(group.now)
        return previous

    group = Group(skewed(0, 0.3), solve=idle_solver)
    group.run(150)
    gaps = np.diff(sorted(set(tried)))
    assert gaps[0] < 8
    assert all(gaps[-2:] >= 8 * QUICK.interval_s)
    group.popularity = skewed(0, 0.8)
    group.run(16)
    assert tried[-1] > 150


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        (START[:1], "placements must hold 3 mixture layers, got 1"),
        ((spread(EXPERTS, 2, 2 * CAPACITY),) * LAYERS, r"placements\[0\].num_ranks must be 4, got 2"),
        ((*START[:2], spread(EXPERTS, RANKS, CAPACITY + 1)), r"placements\[2\].capacity must be 5, got 6"),
        ((*START[:2], spread(EXPERTS + 1, RANKS, CAPACITY)), r"placements\[2\].num_experts must be 16, got 17"),
    ],
)
def test_placements_of_another_model_or_group_are_refused(placements: tuple[Placement, ...], message: str) -> None:
    group = run_until_loading(Group(skewed(0)))
    with pytest.raises(ValueError, match=message):
        group.machine.request(placements, "wrong", group.now)
    assert group.machine.state == "moving"  # and nothing was disturbed


def test_a_machine_needs_a_layer_and_a_size() -> None:
    with pytest.raises(ValueError, match="placements must hold at least one mixture layer"):
        Rebalancer(QUICK, (), 1)
    with pytest.raises(ValueError, match="expert_bytes must be at least 1, got 0"):
        Rebalancer(QUICK, START, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_move_away_from_a_slow_rank_and_come_back(seed: int) -> None:
    """Even traffic, which nobody would move for on equal ranks."""

    def solve(loads_LE: np.ndarray, previous: tuple[Placement, ...]) -> tuple[Placement, ...]:
        slowness = group.slowness or None
        return balance(loads_LE, Topology.regular(RANKS, RANKS), CAPACITY, previous=previous, slowness=slowness)

    group = Group(even, seed, solve=solve, noise=0.02)
    assert group.run(60).bytes_moved == 0
    before = step_time(group, 10)
    group.slowness = (1.0, 3.0, 1.0, 1.0)
    slowed = step_time(group, 2)
    group.run(90)
    relieved = step_time(group, 10)
    assert before < relieved < slowed
    assert relieved - before < 0.7 * (slowed - before)
    group.slowness = ()
    group.run(120)
    assert step_time(group, 10) < 1.1 * before
