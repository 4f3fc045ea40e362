"""The supervisor of a group: drives its membership over real processes, whatever these are. Knows no Ray; one asyncio
loop, whose clock it goes by.

Of each worker it hears through one long poll, whose answers are the signs of life too, and through ``gone``, which
tells of the end of a process on this host within milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from moestro.cluster.directory import GroupEntry
from moestro.cluster.directory_calls import DirectoryCalls
from moestro.cluster.group_picture import picture
from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Form, GiveUp, Intent, Kill, MembershipConfig, Start
from moestro.cluster.ranks.report import UNHEARD, RankReport
from moestro.protos.errors import MoestroError
from moestro.router.rehome import rehome
from moestro.router.view import View
from moestro.workers.worker_state import WorkerPhase

log = logging.getLogger(__name__)

TICK_S = 0.1
REPORT_S = 0.5
RETRY_S = 0.1
ASK_S = 5.0
STOP_S = 10.0
FAREWELL_S = 0.5  # the directory may be stopping too, and then nobody needs to hear that we go

Held = tuple[tuple[int, ...], ...]


class GroupFailed(MoestroError):
    """A group that did not come up, or that has to be replaced as a whole."""


class WorkerGone(Exception):
    """The process has ended, for good."""


class WorkerHandle(Protocol):
    """One worker's process, from outside. What fails otherwise than with WorkerGone may be tried again."""

    async def watch(self, version: int) -> RankReport:
        """Answers when there is another version than ``version``, or a little later. Raises WorkerGone."""

    async def gone(self) -> str:
        """Returns when the process has ended, with what is known of why; never, where nobody can tell."""

    async def form(self, view: View) -> None: ...

    async def holdings(self) -> Held: ...

    async def drain(self, seconds: float) -> None: ...

    async def stop(self) -> None: ...

    def kill(self) -> None:
        """Fences the process: a stopped one too, at once where it can be reached. Idempotent."""


class Launch(Protocol):
    """Starts the process of a worker, which loads and then waits for its first view."""

    def __call__(self, seat: int, worker: int, held: Held | None, gently: bool) -> Awaitable[WorkerHandle]: ...


class Supervisor:
    """``start`` once; then ``check`` says whether the group is to be kept."""

    def __init__(
        self,
        config: MembershipConfig,
        entry: GroupEntry,
        directory: DirectoryCalls,
        launch: Launch,
        *,
        drain_s: float,
        redundant: int = 0,
    ) -> None:
        """``entry``: the group's place in the directory. ``redundant``: slots beyond one per expert."""
        self._membership = Membership(config, entry.epoch)
        self._directory, self._launch = directory, launch
        self._drain_s, self._redundant = drain_s, redundant
        self._handles: dict[int, WorkerHandle] = {}
        self._reports: dict[int, RankReport] = {}
        self._entry = entry
        self._shown: GroupEntry | None = None  # what the directory was told last
        self._news = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def entry(self) -> GroupEntry:
        """The group as it is now."""
        self._entry = picture(self._entry, self._membership, self._reports)
        return self._entry

    async def start(self) -> None:
        """Returns when the group serves. Raises GroupFailed with the reason when it does not come up."""
        self._run(self._tick())
        self._run(self._tell_directory())
        self._carry_out(self._membership.begin(self._now_s()))
        while not self._membership.is_settled:
            self.check()
            await asyncio.wait([self._end], timeout=TICK_S)
        await self._put()

    def check(self) -> None:
        """Raises GroupFailed when the group is over."""
        if self._end.done():
            raise GroupFailed(self._end.result())

    async def drain(self, seconds: float) -> None:
        """Takes nothing new; returns when nothing runs any more. What does after ``seconds`` is to go elsewhere."""
        self._membership.drain()
        self._news.set()
        await self._of_all((handle.drain(seconds) for handle in self._handles.values()), seconds + ASK_S)

    async def stop(self) -> None:
        """Takes the group out of the directory and ends its processes."""
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._directory.remove(self._entry.name, self._entry.epoch), FAREWELL_S)
        await self._of_all((handle.stop() for handle in self._handles.values()), STOP_S)
        for handle in self._handles.values():
            handle.kill()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[task := asyncio.create_task(work)] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the supervisor failed", self._entry.name, exc_info=error)
            self._finish(f"its supervisor failed: {type(error).__name__}: {error}")

    def _finish(self, reason: str) -> None:
        if not self._end.done():
            self._end.set_result(reason)

    async def _tick(self) -> None:
        while True:
            self._carry_out(self._membership.tick(self._now_s()))
            await asyncio.sleep(TICK_S)

    def _carry_out(self, intents: Iterable[Intent]) -> None:
        for intent in intents:
            log.info("%s: %s", self._entry.name, intent)
            match intent:
                case Start(seat, worker):
                    self._run(self._start_worker(seat, worker))
                case Form(view):
                    for member in view.members:
                        self._run(self._form(member.worker, view))
                case Kill(worker):
                    if worker in self._handles:
                        self._handles[worker].kill()
                case GiveUp(reason):
                    self._run(self._retire(reason))
            self._news.set()

    async def _start_worker(self, seat: int, worker: int) -> None:
        gently = self._membership.view is not None
        try:
            handle = await self._launch(seat, worker, await self._share_of(seat) if gently else None, gently)
        except Exception as error:
            log.warning("%s: seat %d: %s", self._entry.name, seat, error)
            self._carry_out(self._membership.died(worker, str(error), self._now_s()))
            return
        self._handles[worker] = handle
        reason = await self._followed(worker, handle)
        del self._handles[worker]
        self._carry_out(self._membership.died(worker, reason, self._now_s()))
        del self._reports[worker]

    async def _share_of(self, seat: int) -> Held | None:
        """The experts that a placement at full strength will want of a seat, by mixture layer, when the others keep
        what they hold as far as they can; None when they do not say."""
        members = self._membership.members()
        asked = asyncio.gather(*(self._handles[member.number].holdings() for member in members))
        try:
            answers = await asyncio.wait_for(asked, ASK_S)
        except Exception as error:
            log.warning("%s: what the ranks hold is not known: %s", self._entry.name, error)
            return None
        held = {member.seat: holdings for member, holdings in zip(members, answers, strict=True)}
        return share_of(seat, self._membership.config.shape.world_size, held, self._redundant)

    async def _followed(self, worker: int, handle: WorkerHandle) -> str:
        """Hears what a worker says until its process has ended; returns what is known of why."""
        ends = [asyncio.create_task(self._watched(worker, handle)), asyncio.create_task(handle.gone())]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return next(end for end in ends if end in done).result()
        finally:
            for end in ends:
                end.cancel()

    async def _watched(self, worker: int, handle: WorkerHandle) -> str:
        version = UNHEARD.version
        while True:
            try:
                report = await handle.watch(version)
            except WorkerGone as error:
                return str(error)
            except Exception as error:  # its silence counts; the call may come through the next time
                log.warning("%s: worker %d: %s", self._entry.name, worker, error)
                await asyncio.sleep(RETRY_S)
                continue
            version = report.version
            self._heard(worker, report)

    def _heard(self, worker: int, report: RankReport) -> None:
        now_s, state = self._now_s(), report.state
        self._reports[worker] = report
        since = None if report.step_age_s is None else now_s - report.step_age_s
        view = self._membership.view
        if view is not None and state.phase is WorkerPhase.SERVING and state.epoch == view.epoch:
            self._membership.needs(len(view.members) - state.spare_ranks)
        self._carry_out(self._membership.told(worker, replace(state, in_step_since_s=since), now_s))
        view = self._membership.view
        if view is not None and view.rank_of(worker) is not None and state.epoch < view.epoch:
            self._run(self._form(worker, view))  # again: it may not have come through
        if _ranks(picture(self._entry, self._membership, self._reports)) != _ranks(self._shown):
            self._news.set()

    async def _form(self, worker: int, view: View) -> None:
        handle = self._handles.get(worker)
        if handle is not None:
            with contextlib.suppress(Exception):  # whatever is wrong with it is heard elsewhere
                await handle.form(view)

    async def _retire(self, reason: str) -> None:
        """What runs goes elsewhere; then the group is over."""
        if self._membership.view is not None:
            members = {member.number for member in self._membership.members()}
            serves = len(members) >= len(self._membership.view.members)
            await self.drain(self._drain_s if serves else 0.0)
        self._finish(reason)

    async def _tell_directory(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), REPORT_S)
            self._news.clear()
            await self._put()

    async def _put(self) -> None:
        """A directory that is being replaced hears of us the next time."""
        self._shown = self.entry
        try:
            if not await self._directory.put(self._shown):
                self._finish(f"epoch {self._shown.epoch} is over")
        except Exception as error:
            log.warning("directory: %s", error)

    async def _of_all(self, calls: Iterable[Awaitable[None]], limit_s: float) -> None:
        """Of workers some of which may be gone, and have nothing left to do, or may not answer."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), limit_s)


def share_of(seat: int, num_seats: int, held: Mapping[int, Held], redundant: int) -> Held:
    """By mixture layer the experts for an empty seat. ``held``: by seat what the ranks that serve hold."""
    layers = []
    for experts_by_rank in zip(*held.values(), strict=True):
        by_seat = dict(zip(held, experts_by_rank, strict=True))
        num_experts = 1 + max(set().union(*experts_by_rank))
        capacity = min(-(-(num_experts + redundant) // num_seats), num_experts)
        placement = rehome([by_seat.get(each, ()) for each in range(num_seats)], num_experts, capacity)
        layers.append(tuple(expert for expert in placement.slots[seat] if expert >= 0))
    return tuple(layers)


def _ranks(entry: GroupEntry | None) -> tuple[object, ...]:
    """What a gateway must know at once."""
    if entry is None:
        return ()
    return entry.epoch, entry.activity, tuple((rank.state, rank.address) for rank in entry.ranks)
