"""The supervisor of a group over made-up processes, with a real directory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.bench.virtual_time import run_virtual

from moestro.cluster.directory import GroupEntry, RankState
from moestro.cluster.directory_calls import DirectoryServer
from moestro.cluster.membership_records import MembershipConfig
from moestro.cluster.ranks.report import UNHEARD, WATCH_S, RankReport
from moestro.cluster.supervisor import GroupFailed, Held, Supervisor, WorkerGone, share_of
from moestro.router.parallel import GroupShape
from moestro.router.view import View
from moestro.workers.worker_state import WorkerPhase, WorkerState

P = WorkerPhase
LOAD_S, JOIN_S = 2.0, 0.1
EXPERTS = 6  # in one mixture layer


@dataclass
class Process:
    """Implements WorkerHandle: loads, and comes to serve in every view that all its members come to."""

    group: Group
    seat: int
    worker: int
    held: Held
    gently: bool
    report: RankReport = UNHEARD
    stopped: bool = False
    killed: bool = False
    drained: float | None = None

    def __post_init__(self) -> None:
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(LOAD_S, self.load)

    def load(self) -> None:
        if self.seat in self.group.cannot_load:
            self.tell(state=WorkerState(P.FAILED, reason="CheckpointError: no such tensor"))
        else:
            self.tell(state=WorkerState(P.READY), address=f"h:{self.worker}")

    def tell(self, **news: Any) -> None:
        self.report = replace(self.report, version=self.report.version + 1, **news)

    async def watch(self, version: int) -> RankReport:
        waited = 0.0
        while self.stopped or (version == self.report.version and waited < WATCH_S):
            await asyncio.sleep(0.01)
            waited += 0.01
        if self.ended.done():
            raise WorkerGone(self.ended.result())
        return self.report

    async def gone(self) -> str:
        return await asyncio.shield(self.ended)

    async def form(self, view: View) -> None:
        if view.epoch > self.report.state.epoch and not self.stopped:
            self.tell(state=WorkerState(P.JOINING, view.epoch))
            asyncio.get_running_loop().call_later(JOIN_S, self.serve, view)

    def serve(self, view: View) -> None:
        """A little later in each seat."""
        asyncio.get_running_loop().call_later(0.01 * self.seat, self.serves, view)

    def serves(self, view: View) -> None:
        here = [self.group.processes[member.worker] for member in view.members]
        if all(p.report.state.epoch == view.epoch and not p.stopped and not p.ended.done() for p in here):
            self.tell(state=WorkerState(P.SERVING, view.epoch, spare_ranks=len(here) - self.group.fewest))

    async def holdings(self) -> Held:
        return self.held

    async def drain(self, seconds: float) -> None:
        await self.answered()
        self.drained = seconds

    async def stop(self) -> None:
        await self.answered()
        self.end("asked to")

    async def answered(self) -> None:
        """A stopped process answers nothing until it is killed."""
        if self.stopped:
            await self.gone()

    def kill(self) -> None:
        self.killed = True
        self.end("killed")

    def end(self, reason: str) -> None:
        self.stopped = False
        if not self.ended.done():
            self.ended.set_result(reason)


@dataclass
class Group:
    config: MembershipConfig = field(default_factory=lambda: MembershipConfig(GroupShape(3)))
    fewest: int = 1
    cannot_load: set[int] = field(default_factory=set)
    directory: Any = field(default_factory=DirectoryServer)
    processes: dict[int, Process] = field(default_factory=dict)

    async def supervisor(self) -> Supervisor:
        entry = await self.directory.begin(self.config.shape.dp, self.config.shape.tp)
        return Supervisor(self.config, entry, self.directory, self.launch, drain_s=5.0)

    async def launch(self, seat: int, worker: int, held: Held | None, gently: bool) -> Process:
        mine = ((2 * seat, 2 * seat + 1),) if held is None else held
        self.processes[worker] = Process(self, seat, worker, mine, gently)
        return self.processes[worker]

    async def entry(self) -> GroupEntry:
        (entry,) = (await self.directory.watch(-1)).groups
        return entry

    async def states(self) -> str:
        """A letter a seat."""
        return "".join(rank.state.name[:2] for rank in (await self.entry()).ranks)


def supervised(scenario: Callable[[Group, Supervisor], Any], **options: Any) -> None:
    async def run() -> None:
        group = Group(**options)
        supervisor = await group.supervisor()
        await supervisor.start()
        try:
            await scenario(group, supervisor)
        finally:
            await supervisor.stop()
        assert all(process.killed for process in group.processes.values() if process.drained is not None)

    run_virtual(run())


def test_a_loss_is_told_at_once_and_made_good() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        assert (await group.states(), (await group.entry()).epoch) == ("SESESE", 1)
        assert ((await group.entry()).activity, (await group.entry()).spare_ranks) == ("", 2)
        await asyncio.sleep(10)
        group.processes[1].end("exit code -9")
        await asyncio.sleep(0.05)
        entry = await group.entry()
        assert (await group.states(), entry.epoch, entry.forming) == ("SELOSE", 1, True)
        assert entry.activity == "forming epoch 2 from 2 of 3 ranks, rank 1 lost"
        await asyncio.sleep(1.0)
        entry = await group.entry()
        assert (await group.states(), entry.epoch, entry.forming) == ("SESTSE", 2, False)
        assert (entry.activity, entry.spare_ranks) == ("rank 1 restarting", 1)
        assert group.processes[3].gently
        await asyncio.sleep(LOAD_S + 1.0)
        entry = await group.entry()
        assert (await group.states(), entry.epoch, entry.activity) == ("SESESE", 3, "")
        assert entry.ranks[1].address == "h:3"
        assert (entry.recovery.losses, entry.recovery.recoveries, entry.recovery.restorations) == (1, 1, 1)
        supervisor.check()

    supervised(scenario)


def test_a_newcomer_serves_when_the_epoch_that_it_came_with_does() -> None:
    """A gateway attaches with the group's epoch, and a rank that is further refuses it."""

    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        group.processes[1].end("exit code -9")
        await asyncio.sleep(LOAD_S + 0.2)
        seen = []
        for _ in range(200):
            entry = supervisor.entry
            seen.append((entry.ranks[1].state, entry.epoch))
            await asyncio.sleep(0.005)
        assert list(dict.fromkeys(seen)) == [(RankState.STARTING, 2), (RankState.SERVING, 3)]

    supervised(scenario)


def test_a_stopped_process_is_killed() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        group.processes[2].stopped = True
        await asyncio.sleep(3.5)
        assert group.processes[2].killed
        assert [process.killed for process in group.processes.values()][:2] == [False, False]
        await asyncio.sleep(5.0)
        assert await group.states() == "SESESE"

    supervised(scenario)


def test_what_fails_at_the_start_is_said() -> None:
    async def run() -> None:
        group = Group(cannot_load={1})
        supervisor = await group.supervisor()
        with pytest.raises(GroupFailed, match=r"^CheckpointError: no such tensor$"):
            await supervisor.start()
        await supervisor.stop()
        assert all(process.killed for process in group.processes.values())
        assert (await group.directory.watch(-1)).groups == ()

    run_virtual(run())


def test_where_the_experts_no_longer_fit_what_runs_goes_elsewhere_and_the_group_is_over() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        assert (await group.entry()).spare_ranks == 1
        group.processes[0].end("exit code -9")
        await asyncio.sleep(4.0)
        supervisor.check()
        group.processes[1].end("exit code -9")
        group.cannot_load = {0}
        await asyncio.sleep(0.5)
        assert await group.states() == "LOLODR"
        assert (await group.entry()).activity.startswith("draining: 1 of 3 ranks are left, and 2 are needed")
        assert group.processes[2].drained == 0.0
        with pytest.raises(GroupFailed, match="1 of 3 ranks are left"):
            supervisor.check()

    supervised(scenario, fewest=2, cannot_load=set(), config=MembershipConfig(GroupShape(3), replace=False))


def test_below_min_ranks_it_finishes_what_it_has_first() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        group.processes[0].end("exit code -9")
        await asyncio.sleep(1.0)
        assert await group.states() == "LODRDR"
        assert [process.drained for process in group.processes.values()] == [None, 5.0, 5.0]
        with pytest.raises(GroupFailed, match="2 of 3 ranks are left, and 3 are needed"):
            supervisor.check()

    supervised(scenario, config=MembershipConfig(GroupShape(3), min_ranks=3))


def test_who_does_not_answer_does_not_keep_a_group_from_its_end() -> None:
    """Found by the chaos harness: a group that had given up waited for ever for a replacement that stood still."""

    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        group.processes[0].end("exit code -9")
        await asyncio.sleep(1)
        group.processes[3].stopped = True  # the replacement, loading
        group.processes[1].end("exit code -9")
        group.processes[2].end("exit code -9")
        await asyncio.sleep(20)
        with pytest.raises(GroupFailed):
            supervisor.check()
        async with asyncio.timeout(20):
            await supervisor.stop()

    supervised(scenario)


def test_a_directory_that_is_away_changes_nothing_and_one_that_refuses_ends_the_group() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        put, group.directory.put = group.directory.put, None  # calls fail
        await asyncio.sleep(30)
        supervisor.check()
        group.directory.put = put
        await asyncio.sleep(1)
        assert await group.states() == "SESESE"
        await group.directory.put(replace(await group.entry(), epoch=9))
        await asyncio.sleep(1)
        with pytest.raises(GroupFailed, match="epoch 1 is over"):
            supervisor.check()

    supervised(scenario)


def test_a_newcomer_loads_what_the_others_will_not_keep() -> None:
    async def scenario(group: Group, supervisor: Supervisor) -> None:
        await asyncio.sleep(10)
        group.processes[0].held, group.processes[2].held = ((0, 1, 2),), ((3, 4, 5),)
        group.processes[1].end("exit code -9")
        await asyncio.sleep(4.0)
        (experts,) = group.processes[3].held
        assert len(experts) == 2
        assert len({0, 1, 2} & set(experts)) == 1

    supervised(scenario)


def test_shares_are_even_and_complete() -> None:
    held = {0: ((0, 1, 2), (5, 3, 1)), 2: ((3, 4, 5), (0, 2, 4))}
    first, second = share_of(1, 3, held, 0)
    assert len(first) == len(second) == 2
    assert share_of(1, 3, {0: (), 2: ()}, 0) == ()  # a dense model has nothing to place


def test_draining_shows_and_stopping_removes() -> None:
    async def run() -> None:
        group = Group()
        supervisor = await group.supervisor()
        await supervisor.start()
        await supervisor.drain(1.5)
        await asyncio.sleep(0.2)
        assert [process.drained for process in group.processes.values()] == [1.5] * 3
        assert {rank.state for rank in (await group.entry()).ranks} == {RankState.DRAINING}
        await supervisor.stop()
        assert (await group.directory.watch(-1)).groups == ()

    run_virtual(run())
