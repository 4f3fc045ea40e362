"""The membership of a group: what it decides, told by scenarios and by random faults over made-up workers."""

from __future__ import annotations

import itertools
import random
import textwrap

import pytest
from tests.cluster.membership_world import LOAD_S, World, described

from moestro.cluster.membership_records import FIRST_PAUSE_S, Form, GiveUp, Kill, MembershipConfig, Start
from moestro.router.parallel import GroupShape
from moestro.workers.worker_state import WorkerPhase, WorkerState

P = WorkerPhase


def world(dp: int = 3, tp: int = 1, **options: object) -> World:
    """A group that has served until ten seconds after its start."""
    rules = {name: options.pop(name) for name in ("min_ranks", "replace", "watchdog_s") if name in options}
    it = World(MembershipConfig(GroupShape(dp, tp), **rules), **options)  # type: ignore[arg-type]
    it.run(10.0)
    assert it.membership.is_settled
    it.log.clear()
    return it


def said(it: World) -> str:
    return "\n".join(it.log)


def transcript(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_a_lost_rank_leaves_a_view_and_is_replaced_after_the_others_serve() -> None:
    it = world()
    it.die(it.at(1))
    it.run(6.0)
    assert said(it) == transcript(
        """\
        10.00  . worker 1 ends: exit code -9
        10.02  form epoch 2 of 0:0 2:2
        10.23  start worker 3 in seat 1
        12.23  form epoch 3 of 0:0 1:3 2:2
        """
    )
    assert it.membership.is_settled
    totals = it.membership.totals
    assert (totals.losses, totals.recoveries, totals.restorations) == (1, 1, 1)
    assert 0 < totals.recovery_s < 0.5 < LOAD_S < totals.restoration_s < 3


def test_a_loss_is_answered_while_the_group_sleeps() -> None:
    it = world(busy=False)
    it.die(it.at(0))
    it.run(0.4)
    assert it.membership.is_settled
    assert it.membership.view is not None
    assert [member.seat for member in it.membership.view.members] == [1, 2]


def test_a_stopped_worker_is_killed_after_the_watchdogs_time_and_nobody_else() -> None:
    it = world()
    began = it.now_s
    it.at(2).stopped = True
    it.run(8.0)
    (at_s, kill), = [(s, i) for s, i in it.intents if isinstance(i, Kill)]  # fmt: skip
    assert kill == Kill(2, kill.reason)
    assert kill.reason.startswith("no answer for 3.")
    assert 3.0 <= at_s - began < 3.4
    assert it.membership.is_settled
    assert it.membership.view is not None
    assert it.membership.view.shape.dp == 3


def test_a_worker_whose_turn_hangs_is_told_from_those_who_wait_for_it() -> None:
    it = world()
    began = it.now_s
    it.at(0).hung = True
    it.run(8.0)
    (at_s, kill), = [(s, i) for s, i in it.intents if isinstance(i, Kill)]  # fmt: skip
    assert kill == Kill(0, "the others wait for it in epoch 1")
    assert 3.0 <= at_s - began < 3.6
    assert it.membership.is_settled


def test_a_standstill_without_a_culprit_forms_the_same_members_again() -> None:
    it = world()
    it.membership.tick(it.now_s)
    now = it.now_s
    stuck = WorkerState(P.SERVING, epoch=1, turns=9, progress=70, in_step_since_s=now)
    intents = []
    for tenth in range(120):
        at_s = now + tenth / 10
        for worker in range(3):
            intents += it.membership.told(worker, stuck, at_s)
    assert [described(i) for i in intents] == ["form epoch 2 of 0:0 1:1 2:2"]


def test_a_member_that_sleeps_through_a_step_is_not_killed_for_it() -> None:
    it = world()
    now, intents = it.now_s, []
    for tenth in range(40):
        for worker in range(2):
            state = WorkerState(P.SERVING, epoch=1, turns=9, progress=70, in_step_since_s=now)
            intents += it.membership.told(worker, state, now + tenth / 10)
        intents += it.membership.told(2, WorkerState(P.SERVING, epoch=1, turns=8, progress=69), now + tenth / 10)
    assert [described(i) for i in intents] == ["form epoch 2 of 0:0 1:1 2:2"]


def test_an_epoch_that_breaks_with_nobody_lost_waits_for_a_sign_of_life_of_each() -> None:
    it = world()
    now = it.now_s + 0.3
    broken = WorkerState(P.BROKEN, epoch=1, reason="connection reset")
    serving = WorkerState(P.SERVING, epoch=1)
    assert it.membership.told(0, broken, now) == []
    assert it.membership.told(1, serving, now + 0.01) == []
    (form,) = it.membership.told(2, serving, now + 0.02)
    assert described(form) == "form epoch 2 of 0:0 1:1 2:2"


def test_a_tensor_parallel_peer_takes_its_set_along_and_no_other() -> None:
    it = world(dp=2, tp=2)
    it.die(it.at(1))
    it.run(5.0)
    assert said(it) == transcript(
        """\
        10.00  . worker 1 ends: exit code -9
        10.02  kill worker 0: its tensor-parallel peer in seat 1 was lost
        10.02  form epoch 2 of 2:2 3:3
        10.04  kill worker 0: its tensor-parallel peer in seat 1 was lost
        10.07  . worker 0 ends: killed
        10.23  start worker 4 in seat 0
        10.23  start worker 5 in seat 1
        12.23  form epoch 3 of 0:4 1:5 2:2 3:3
        """
    )


def test_a_rank_that_does_not_come_up_is_tried_again_at_longer_and_longer_intervals() -> None:
    it = world(dies_loading={})
    it.dies_loading[1] = 4
    it.die(it.at(1))
    it.run(40.0)
    starts = [s for s, i in it.intents if isinstance(i, Start) and i.seat == 1][1:]
    pauses = [later - earlier - 1.0 for earlier, later in itertools.pairwise(starts)]
    assert pauses == [pytest.approx(FIRST_PAUSE_S * 2**n, abs=0.2) for n in range(4)]
    assert it.membership.is_settled
    assert it.membership.view is not None
    assert it.membership.view.shape.dp == 3
    assert not any(isinstance(i, GiveUp) for _, i in it.intents)


def test_what_fails_at_the_start_is_given_up_with_its_reason() -> None:
    it = World(MembershipConfig(GroupShape(2)), dies_loading={1: 1})
    it.run(3.0)
    assert [i for _, i in it.intents if isinstance(i, GiveUp)] == [GiveUp("out of memory")]
    assert not any(isinstance(i, Form) for _, i in it.intents)


def test_below_min_ranks_the_survivors_serve_what_they_have_and_nothing_is_started() -> None:
    it = world(min_ranks=3)
    it.die(it.at(1))
    it.run(10.0)
    assert it.membership.given_up == "2 of 3 ranks are left, and 3 are needed"
    assert it.membership.is_settled
    assert it.membership.view is not None
    assert it.membership.view.shape.dp == 2
    assert len([i for _, i in it.intents if isinstance(i, Start)]) == 3


def test_where_the_experts_do_not_fit_no_view_is_formed() -> None:
    it = world()
    it.membership.needs(3)
    assert it.membership.spare_ranks == 0
    it.die(it.at(1))
    it.run(5.0)
    assert it.membership.given_up
    assert len([i for _, i in it.intents if isinstance(i, Form)]) == 1


def test_newcomers_are_blamed_when_no_view_with_them_comes_about() -> None:
    it = world()
    it.die(it.at(1))
    it.run(1.0)
    now, membership = it.now_s, it.membership
    intents = membership.told(3, WorkerState(P.READY), now)
    for tries in range(3):
        epoch = membership.view.epoch if membership.view else 0
        assert [described(i) for i in intents] == [f"form epoch {epoch} of 0:0 1:3 2:2"], tries
        now += 2.0
        for worker in (0, 2, 3):
            membership.told(worker, WorkerState(P.JOINING, epoch=epoch), now)
        for worker in (0, 2, 3):
            intents = membership.told(worker, WorkerState(P.BROKEN, epoch=epoch, reason="no"), now)
            if intents:
                break
        intents = intents or membership.told(0, WorkerState(P.BROKEN, epoch=epoch, reason="no"), now + 0.9)
    assert [described(i) for i in intents] == [
        "kill worker 3: 3 views with it did not come about",
        "form epoch 6 of 0:0 2:2",
    ]


def test_who_comes_back_from_the_dead_is_fenced_again() -> None:
    it = world()
    it.membership.died(1, "its node is gone", it.now_s)
    assert it.membership.told(1, WorkerState(P.BROKEN, epoch=1), it.now_s + 9) == [Kill(1, "its epoch is over")]


def test_a_supervisor_that_stood_still_blames_nobody() -> None:
    it = world()
    assert it.membership.tick(it.now_s + 500.0) == []
    assert it.membership.is_settled


def test_a_group_that_drains_takes_nobody_in() -> None:
    it = world()
    it.membership.drain()
    it.die(it.at(1))
    it.run(5.0)
    assert [described(i) for _, i in it.intents][4:] == ["form epoch 2 of 0:0 2:2"]


@pytest.mark.parametrize("seed", range(1, 41))
def test_any_faults_end_at_full_strength_or_in_an_honest_end(seed: int) -> None:
    draw = random.Random(f"membership {seed}")
    tp = draw.choice((1, 1, 2))
    it = World(MembershipConfig(GroupShape(draw.randint(2, 4), tp)), seed=seed, busy=draw.random() < 0.8)
    it.run(8.0)
    guilty: set[int] = set()

    def check() -> None:
        forms = [i.view for _, i in it.intents if isinstance(i, Form)]
        epochs = [view.epoch for view in forms]
        assert epochs == list(range(1, len(forms) + 1))
        for process in it.processes.values():
            others = [p for p in it.processes.values() if p.seat == process.seat and p.alive and not p.stopped]
            assert len(others) <= 1, "two processes in one seat"

    for _ in range(draw.randint(3, 10)):
        seat = draw.randrange(it.config.shape.world_size)
        for process in [p for p in it.processes.values() if p.seat == seat and p.alive][-1:]:
            guilty |= {process.number}
            match draw.choice(("die", "die", "stop", "hang")):
                case "die":
                    it.die(process)
                case "stop":
                    process.stopped = True
                case "hang":
                    process.hung = True
        it.run(draw.choice((0.01, 0.1, 0.3, 1.0, 5.0, 12.0)), check)
    it.run(200.0, check)
    blamed = {i.worker for _, i in it.intents if isinstance(i, Kill)}
    sets = {it.processes[worker].seat // tp for worker in guilty}
    assert all(it.processes[worker].seat // tp in sets for worker in blamed), said(it)
    if it.membership.given_up:
        assert "0 of" in it.membership.given_up, said(it)
    else:
        assert it.membership.is_settled, said(it)
        assert it.membership.view is not None
        assert it.membership.view.shape == it.config.shape, said(it)
