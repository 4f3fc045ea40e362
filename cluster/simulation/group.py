"""A simulated group: its supervisor around the real membership core, and the processes of its ranks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Form, GiveUp, Intent, Kill, MembershipConfig, Start, Tracked
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.handles import Handle, Host
from moestro.cluster.simulation.mesh import Fabric
from moestro.cluster.simulation.rank import SimulatedRank
from moestro.cluster.simulation.rpc import Sockets
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import Process
from moestro.cluster.simulation.worker import Observe
from moestro.router.parallel import GroupShape
from moestro.router.view import View
from moestro.workers.scheduler_config import SchedulerConfig
from moestro.workers.worker_state import WorkerPhase

REPORT_S = 0.5
TICK_S = 0.1
RESTART_S = 1.0  # until Serve has started another supervisor
KILL_S = 0.2  # at most, until a process that is killed is gone


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What every group of a scenario is like."""

    shape: GroupShape
    scheduler: SchedulerConfig
    experts: Experts


class SimulatedGroup:
    """A place for a group. When its supervisor dies or gives up, a new one begins with new ranks, as Serve does it."""

    def __init__(
        self, number: int, plan: GroupPlan, make_process: Callable[[str], Process], sockets: Sockets,
        directory: DirectoryCalls, rng: random.Random, trace: Trace, observe: Observe,
    ) -> None:  # fmt: skip
        self.number, self.plan = number, plan
        self.make_process, self.sockets, self.directory = make_process, sockets, directory
        self.rng, self.trace, self.observe = rng, trace, observe
        self.supervisor: Supervisor | None = None
        self._incarnation = 0

    @property
    def name(self) -> str:
        return "" if self.supervisor is None else self.supervisor.entry.name

    @property
    def is_full(self) -> bool:
        """Whether every seat serves."""
        return self.supervisor is not None and self.supervisor.is_full

    @property
    def ranks(self) -> list[SimulatedRank]:
        """Those that live, by worker."""
        ranks = () if self.supervisor is None else self.supervisor.ranks.values()
        return [rank for rank in ranks if rank.process.is_alive]

    def start(self) -> None:
        """A new supervisor."""
        self._incarnation += 1
        process = self.make_process(f"place-{self.number}.{self._incarnation}")
        supervisor = self.supervisor = Supervisor(self, process)
        process.at_death(supervisor.end)
        process.at_death(self._start_again)
        process.spawn(supervisor.run())

    def _start_again(self) -> None:
        asyncio.get_running_loop().call_later(RESTART_S, self.start)


class Supervisor:
    """Carries out what the membership core decides."""

    def __init__(self, group: SimulatedGroup, process: Process) -> None:
        self.process = process
        self.ranks: dict[int, SimulatedRank] = {}  # by worker
        self.entry = GroupEntry("", group.plan.shape.dp, group.plan.shape.tp)
        self.is_full = False  # every seat serves
        self._group = group
        self._fabric = Fabric(group.sockets.network)
        self._membership: Membership | None = None
        self._over = asyncio.Event()

    async def run(self) -> None:
        plan, time = self._group.plan, asyncio.get_running_loop().time
        while not self.entry.name:
            try:
                self.entry = await self._group.directory.begin(plan.shape.dp, plan.shape.tp)
            except ConnectionError:
                await asyncio.sleep(REPORT_S)
        experts = plan.experts
        membership = self._membership = Membership(MembershipConfig(plan.shape), self.entry.epoch)
        membership.needs(-(-experts.num_experts // experts.most_slots))
        self._carry_out(membership.begin(time()))
        self.process.spawn(self._report(), "report")
        while not self._over.is_set():
            self._carry_out(membership.tick(time()))
            await asyncio.sleep(TICK_S)
        await asyncio.sleep(1.0)  # until it has been reported; what runs there migrates
        self.process.kill()

    def end(self) -> None:
        """With the supervisor go the store and all that it has started."""
        for rank in self.ranks.values():
            rank.process.kill()

    def _carry_out(self, intents: list[Intent]) -> None:
        for intent in intents:
            self._group.trace(self.process.name, "{}", intent)
            match intent:
                case Start(seat, worker):
                    self._start(seat, worker)
                case Form(view):
                    self._form(view)
                case Kill(worker, _):
                    asyncio.get_running_loop().call_later(
                        self._group.rng.uniform(0.0, KILL_S), self.ranks[worker].process.kill
                    )
                case GiveUp():
                    self._over.set()

    def _start(self, seat: int, worker: int) -> None:
        group = self._group
        process = group.make_process(f"{self.process.name}/w{worker}")
        rank = self.ranks[worker] = SimulatedRank(
            process, worker, self.entry.epoch, group.sockets, self._fabric, group.plan.scheduler, group.rng,
            group.observe,
        )  # fmt: skip
        process.spawn(rank.run(self._experts_for(seat)), "rank")
        self.process.spawn(self._watch(worker, rank), "watch")

    def _experts_for(self, seat: int) -> Experts:
        """What a new worker is to read: for full strength at the start, then what the others lack."""
        assert self._membership is not None
        experts, members = self._group.plan.experts, self._membership.members()
        if not members:
            return experts.at_start(self._group.plan.shape.world_size, seat)
        held = [[sorted(layer) for layer in self.ranks[member.number].worker.held] for member in members]
        return experts.for_newcomer(held, sum(member.seat < seat for member in members))

    def _form(self, view: View) -> None:
        processes = {member.worker: self.ranks[member.worker].process for member in view.members}
        for member in view.members:
            rank = self.ranks[member.worker]
            pipe = self._group.sockets.network.pipe(self.process, rank.process)
            pipe.send(lambda worker=rank.worker: worker.form(view, processes))  # type: ignore[misc]

    async def _watch(self, worker: int, rank: SimulatedRank) -> None:
        """Tells the membership what is heard of one worker."""
        assert self._membership is not None
        membership, time = self._membership, asyncio.get_running_loop().time
        handle = Handle(self._group.sockets.network, lambda: Host(rank.process, rank.worker))
        phase, epoch = None, 0
        while True:
            try:
                state = await handle.watch(phase, epoch)
            except ConnectionError as error:
                self._carry_out(membership.died(worker, str(error), time()))
                return
            phase, epoch = state.phase, state.epoch
            self._carry_out(membership.told(worker, state, time()))

    async def _report(self) -> None:
        while True:
            self.entry = replace(self.entry, ranks=tuple(self._rank_entry(each) for each in self.entry.ranks))
            self.is_full = all(rank.state is RankState.SERVING for rank in self.entry.ranks)
            try:
                if not await self._group.directory.put(self.entry):
                    self._over.set()  # another group has its place
            except ConnectionError:
                pass
            await asyncio.sleep(REPORT_S)

    def _rank_entry(self, entry: RankEntry) -> RankEntry:
        assert self._membership is not None
        worker = self._membership.worker_at(entry.dp_rank * self.entry.tp + entry.tp_rank)
        address = "" if worker is None or entry.tp_rank else self.ranks[worker.number].address
        return replace(entry, state=_state(worker, self._over.is_set()), address=address)


def _state(worker: Tracked | None, drains: bool) -> RankState:
    if worker is None:
        return RankState.LOST
    if drains:
        return RankState.DRAINING
    forms = worker.state.phase in (WorkerPhase.JOINING, WorkerPhase.BROKEN)
    serves = worker.state.phase is WorkerPhase.SERVING or (forms and worker.has_served)
    return RankState.SERVING if serves else RankState.STARTING
