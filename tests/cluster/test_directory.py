"""The directory: who is there, at which epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moestro.cluster.directory import (
    EXPIRY_S,
    FORGET_S,
    SETTLE_S,
    START_S,
    Directory,
    GatewayEntry,
    GatewayReport,
    GroupEntry,
    RankEntry,
    RankState,
    Snapshot,
)

GATEWAY = GatewayEntry("g", "localhost:1")


def serving(group: GroupEntry, state: RankState = RankState.SERVING) -> GroupEntry:
    return replace(group, ranks=tuple(replace(rank, state=state) for rank in group.ranks))


def test_a_group_begins_starting_and_serves_with_the_ranks_that_do() -> None:
    directory = Directory()
    group = directory.begin(dp=2, tp=2, now_s=0.0)
    assert (group.name, group.epoch, group.is_serving) == ("group-0", 1, False)
    assert [(rank.dp_rank, rank.tp_rank) for rank in group.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    half = replace(group, ranks=(*serving(group).ranks[:2], *serving(group, RankState.LOST).ranks[2:]))
    assert directory.put(half, 1.0)
    assert directory.snapshot().groups[0].is_serving
    assert not directory.snapshot().groups[0].is_lost
    assert directory.put(serving(group, RankState.LOST), 2.0)
    assert not directory.snapshot().groups[0].is_serving
    assert directory.snapshot().groups[0].is_lost
    assert not GroupEntry("empty", 1, 1).is_serving


def test_names_are_the_lowest_that_are_free_or_lost() -> None:
    directory = Directory()
    first, second = directory.begin(1, 1, 0.0), directory.begin(1, 1, 0.0)
    assert (first.name, second.name) == ("group-0", "group-1")
    directory.put(serving(first, RankState.LOST), 1.0)
    again = directory.begin(1, 1, 2.0)
    assert (again.name, again.epoch) == ("group-0", 2)
    assert directory.begin(1, 1, 2.0).name == "group-2"
    directory.remove("group-1", second.epoch)
    last = directory.begin(1, 1, 2.0)
    assert (last.name, last.epoch) == ("group-1", 2)


def test_the_past_is_refused() -> None:
    directory = Directory()
    old = directory.begin(1, 1, 0.0)
    directory.put(serving(old, RankState.LOST), 1.0)
    new = serving(directory.begin(1, 1, 2.0))
    directory.put(new, 3.0)
    version = directory.version
    assert not directory.put(serving(old), 4.0)
    directory.remove(old.name, old.epoch)
    assert directory.version == version
    assert directory.snapshot().groups == (new,)


def test_epochs_only_grow_even_over_a_removal() -> None:
    directory = Directory()
    epochs = []
    for _ in range(5):
        group = directory.begin(1, 1, 0.0)
        epochs.append(group.epoch)
        directory.remove(group.name, group.epoch)
    assert epochs == [1, 2, 3, 4, 5]
    assert not directory.put(GroupEntry("group-0", 1, 1, epoch=4), 0.0)


def test_a_new_directory_learns_from_reports() -> None:
    group = GroupEntry("group-3", 1, 1, epoch=9)
    directory = Directory()
    assert directory.put(group, 0.0)
    assert not directory.put(replace(group, epoch=8), 0.0)
    assert directory.snapshot().groups == (group,)


def test_versions_change_when_something_does() -> None:
    directory = Directory()
    group = directory.begin(1, 1, 0.0)
    version = directory.version
    assert directory.put(group, 1.0)
    assert directory.version == version
    directory.put(serving(group), 2.0)
    assert directory.version > version
    version = directory.version
    directory.put_gateway(GATEWAY, GatewayReport(), 2.0)
    assert directory.version > version
    version = directory.version
    directory.put_gateway(GATEWAY, GatewayReport({"group-0": 1}, frozenset({"group-0"})), 3.0)
    directory.remove_gateway("unknown")
    directory.remove("unknown", 1)
    assert directory.version == version


@pytest.mark.parametrize(("silent_s", "gone"), [(EXPIRY_S, False), (EXPIRY_S + 0.1, True)])
def test_who_is_silent_for_too_long_is_gone(silent_s: float, gone: bool) -> None:
    directory = Directory()
    directory.put(serving(directory.begin(1, 1, 0.0)), 1.0)
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), 1.0)
    directory.expire(1.0 + silent_s)
    snapshot = directory.snapshot()
    assert snapshot.groups[0].is_lost is gone  # still shown, since a gateway was attached when it was last heard
    assert (snapshot.gateways == ()) is gone
    directory.put(serving(snapshot.groups[0]), 30.0)  # it was slow, not dead
    assert directory.snapshot().groups[0].is_serving


def test_who_served_and_fell_silent_is_kept_as_long_as_a_gateway_is_attached() -> None:
    directory = Directory()
    group, other = directory.begin(1, 1, 0.0), directory.begin(1, 1, 0.0)
    attached, alone = GatewayReport(attached=frozenset({"group-0"})), GatewayReport(attached=frozenset({"group-1"}))
    directory.put(serving(group), 0.0)
    directory.put(serving(other), FORGET_S)
    directory.put_gateway(GATEWAY, attached, 2.0)
    directory.expire(EXPIRY_S + 1)
    directory.put_gateway(GATEWAY, attached, FORGET_S)
    directory.expire(FORGET_S)
    assert [each.is_silent for each in directory.snapshot().groups] == [True, False]
    directory.put_gateway(GATEWAY, alone, FORGET_S)
    directory.expire(FORGET_S)
    assert [each.name for each in directory.snapshot().groups] == ["group-1"]
    assert directory.begin(1, 1, FORGET_S + 2).epoch == group.epoch + 1


def test_who_is_silent_for_very_long_is_forgotten_though_a_gateway_is_attached() -> None:
    directory = Directory()
    directory.put(serving(directory.begin(1, 1, 0.0)), 0.0)
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), FORGET_S)
    directory.expire(FORGET_S + 1)
    assert directory.snapshot().groups == ()


def test_a_gateway_that_has_gone_is_attached_to_nobody() -> None:
    directory = Directory()
    directory.put(serving(directory.begin(1, 1, 0.0)), 0.0)
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), 0.0)
    directory.remove_gateway(GATEWAY.name)
    directory.expire(EXPIRY_S + 1)
    assert directory.snapshot().groups == ()


def test_one_that_knows_of_nobody_is_settled_at_once() -> None:
    assert Directory(expected=frozenset()).snapshot().settled


def test_a_rebuilt_one_settles_when_all_that_ran_have_reported() -> None:
    groups = [serving(GroupEntry(f"group-{number}", 1, 1, 4, (RankEntry(0, 0),))) for number in range(2)]
    directory = Directory(expected=frozenset({"group-0", "group-1"}), born_s=100.0)
    with pytest.raises(RuntimeError, match="which groups there are"):
        directory.begin(1, 1, 100.0)
    directory.put(groups[0], 100.1)
    assert not directory.snapshot().settled
    version = directory.version
    directory.put(groups[1], 100.2)
    assert directory.snapshot().settled
    assert directory.version > version
    assert directory.begin(1, 1, 100.3).name == "group-2"


@pytest.mark.parametrize("expected", [None, frozenset({"group-7"})])
def test_a_rebuilt_one_settles_by_the_clock_when_somebody_stays_silent(expected: frozenset[str] | None) -> None:
    directory = Directory(expected, born_s=100.0)
    directory.expire(100.0 + SETTLE_S)
    assert not directory.settled
    version = directory.version
    directory.expire(100.1 + SETTLE_S)
    assert directory.settled
    assert directory.version > version


def test_epochs_that_others_remember_are_not_used_again() -> None:
    directory = Directory()
    directory.put_gateway(GATEWAY, GatewayReport({"group-0": 7}), 0.0)
    directory.put_gateway(GATEWAY, GatewayReport({"group-0": 3}), 0.0)
    assert directory.begin(1, 1, 0.0).epoch == 8


def test_nothing_known_is_dropped_before_it_is_settled() -> None:
    old, newer, unknown = GroupEntry("group-0", 1, 1, 3), GroupEntry("group-0", 1, 1, 4), GroupEntry("group-2", 1, 1, 1)
    silent = GroupEntry("group-1", 1, 1, 2)
    unsettled = Snapshot(1, (newer, unknown), (), settled=False)
    assert unsettled.over([old, silent]) == (newer, silent, unknown)
    assert Snapshot(1, (old,), (), settled=False).over([newer]) == (newer,)
    assert Snapshot(2, (newer,), (), settled=True).over([old, silent]) == (newer,)


def test_a_silent_group_gives_up_its_name_but_keeps_who_is_attached() -> None:
    directory = Directory()
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), 1.0)
    silent = serving(directory.begin(1, 1, 0.0))
    directory.put(silent, 1.0)
    directory.expire(2.0 + EXPIRY_S)
    (group,) = directory.snapshot().groups
    assert (group.is_silent, group.is_lost, group.is_serving) == (True, True, True)
    again = directory.begin(1, 1, 20.0)
    assert (again.name, again.epoch, again.is_silent) == (silent.name, silent.epoch + 1, False)
    assert not directory.put(silent, 21.0)


def test_one_that_was_cut_off_blames_nobody_and_asks_again() -> None:
    directory = Directory()
    groups = [serving(directory.begin(1, 1, 0.0)) for _ in range(2)]
    for group in groups:
        directory.put(group, 1.0)
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), 1.0)
    for now_s in (1.5, 2.0, 2.5):
        directory.hear(now_s)
    assert directory.settled
    directory.hear(100.0)
    directory.expire(100.0)
    snapshot = directory.snapshot()
    assert (snapshot.settled, snapshot.groups, len(snapshot.gateways)) == (False, tuple(groups), 1)
    directory.put(groups[0], 100.5)
    assert not directory.settled
    directory.put(groups[1], 100.6)
    assert directory.settled
    directory.expire(100.7 + EXPIRY_S)  # now it is their silence
    assert [group.name for group in directory.snapshot().groups if group.is_silent] == ["group-0"]
    assert directory.snapshot().gateways == ()


def test_one_that_was_cut_off_settles_without_those_who_stay_silent() -> None:
    directory = Directory()
    directory.put(serving(directory.begin(1, 1, 0.0)), 1.0)
    directory.put_gateway(GATEWAY, GatewayReport(attached=frozenset({"group-0"})), 1.0)
    directory.hear(100.0)
    directory.hear(102.0)
    directory.hear(104.0)
    directory.expire(100.1 + SETTLE_S)
    assert directory.settled
    assert directory.snapshot().groups[0].is_silent


def test_a_group_that_is_slow_to_start_keeps_its_name() -> None:
    directory = Directory()
    first = directory.begin(1, 1, 0.0)
    directory.expire(EXPIRY_S + 1)
    assert directory.begin(1, 1, EXPIRY_S + 1).name == "group-1"
    assert directory.put(serving(first), EXPIRY_S + 2)
    assert directory.put(serving(first), START_S)
    directory.expire(START_S + 2)
    assert [group.name for group in directory.snapshot().groups] == ["group-0", "group-1"]
    assert directory.put(serving(first), START_S + EXPIRY_S)
    directory.expire(START_S + EXPIRY_S + 2)
    assert [group.name for group in directory.snapshot().groups] == ["group-0"]


@pytest.mark.parametrize("state", [RankState.DRAINING, RankState.LOST])
def test_a_silent_group_that_served_nobody_is_forgotten(state: RankState) -> None:
    directory = Directory()
    directory.put(serving(directory.begin(1, 1, 0.0), state), 1.0)
    directory.expire(1.0 + EXPIRY_S)
    assert directory.snapshot().groups != ()
    directory.expire(1.1 + EXPIRY_S)
    assert directory.snapshot().groups == ()
