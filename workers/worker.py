"""A worker: one process of a group through all its epochs.

It reads its weights alone. Each view then makes it leave the group it is in, come together with the members of the new
one, and go on there, with its sequences and their KV cache as they were.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moestro.protos.errors import ExpertsDoNotFit
from moestro.protos.experts import ExpertsReport, PlacementRequest
from moestro.protos.sequences import EngineLimits, EngineLoad
from moestro.router.collectives import GroupBroken
from moestro.router.mesh import StoreAddress
from moestro.router.placement import EMPTY
from moestro.router.view import View
from moestro.workers.engine import Engine
from moestro.workers.epoch import Epoch, Meeting, formed
from moestro.workers.interruption import Interruption
from moestro.workers.loading import OnProgress
from moestro.workers.model.decoder import Decoder
from moestro.workers.rank_loop import Account, Inbox, Outbox, RankLoop, StepOutput
from moestro.workers.rank_setup import RankSpec, Share, load_share
from moestro.workers.rebalancing.group_experts import GroupExperts, NoExperts
from moestro.workers.regroup import Superseded
from moestro.workers.scheduler import Scheduler
from moestro.workers.worker_state import WorkerPhase, WorkerState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """What is known of a worker once it has loaded."""

    limits: EngineLimits
    load: EngineLoad  # before anything runs
    device: str
    kernels: str


class Worker:
    """``load``, then ``run`` on a thread of its own. Everything else may be called from any thread, ``form``, ``state``
    and ``stop`` also before."""

    def __init__(
        self,
        spec: RankSpec,
        store: StoreAddress,
        seat: int,
        worker: int,
        *,
        hostname: str = "127.0.0.1",
        on_state: Callable[[WorkerState], None] = lambda _: None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """``on_state`` hears of every new phase, on whichever thread it comes about."""
        self._spec, self._store, self._seat, self._worker = spec, store, seat, worker
        self._hostname = hostname
        self._on_state, self._on_progress = on_state, on_progress
        self._inbox = Inbox()
        self._account = Account()
        self._share: Share
        self._scheduler: Scheduler
        self._changed = threading.Condition()  # guards the six below
        self._told = WorkerState(WorkerPhase.LOADING)
        self._wanted: View | None = None
        self._stopping = False
        self._interruption = Interruption()  # of what is under way
        self._epoch: Epoch | None = None
        self._experts: GroupExperts | NoExperts | None = None  # of the last epoch

    def load(self, held: Sequence[Sequence[int]] | None = None) -> LoadedWorker:
        """Reads this seat's weights; alone, whatever the group does meanwhile. ``held``: by mixture layer the logical
        experts to read; None: those of the seat at full strength. Raises CheckpointError and ConfigError."""
        try:
            share = load_share(self._spec, self._seat, held, self._on_progress)
        except BaseException as error:
            self._tell(WorkerPhase.FAILED, reason=_reason(error))
            raise
        self._share, self._scheduler = share, share.scheduler()
        self._tell(WorkerPhase.READY)
        return LoadedWorker(share.limits, self._scheduler.load(), str(share.device), share.backend.name)

    def run(self, publish: Callable[[StepOutput], None]) -> None:
        """Serves view after view until stopped. ``publish`` is called on this thread and must not block. Raises what is
        this worker's own fault, never what is a peer's."""
        outbox = Outbox(publish)
        try:
            while (view := self._next_view()) is not None:
                self._serve(view, outbox)
        except BaseException as error:
            self._tell(WorkerPhase.FAILED, reason=_reason(error))
            raise
        self._tell(WorkerPhase.STOPPED)

    def form(self, view: View) -> None:
        """Has the worker go over to ``view`` as soon as it can; nothing, if it has heard of that epoch or a newer one.
        A view without this worker has it wait for one with it."""
        with self._changed:
            if self._wanted is not None and view.epoch <= self._wanted.epoch:
                return
            self._wanted = view
            interruption = self._interruption
            self._changed.notify_all()
        interruption.come()

    def submit(self, message: bytes) -> None:
        """Hands over one serialized AttachRequest (submit or cancel) and wakes the group if it sleeps."""
        self._inbox.put(message)
        epoch = self._epoch
        if epoch is not None:
            epoch.lockstep.wake()

    def stop(self) -> None:
        """Asks the whole group to end at the head of its next step; a worker that is in none ends at once."""
        with self._changed:
            self._stopping = True
            epoch, interruption = self._epoch, self._interruption
            self._changed.notify_all()
        if epoch is not None:
            epoch.lockstep.stop()
        else:
            interruption.come()

    @property
    def state(self) -> WorkerState:
        with self._changed:
            told, epoch = self._told, self._epoch
        account = self._account
        return replace(
            told,
            turns=account.turns,
            progress=0 if epoch is None else epoch.mesh.progress,
            in_step_since_s=account.turn_since_s,
        )

    def experts(self) -> ExpertsReport:
        """What the group knows of its experts, or knew when it last stood."""
        experts = self._experts
        return (NoExperts(self.model.config.architecture) if experts is None else experts).report()

    def request_placement(self, request: PlacementRequest) -> None:
        """Asks the whole group to move its experts. Raises ValueError when it cannot be done."""
        epoch = self._epoch
        if epoch is None:
            raise ValueError("the group is being formed")
        epoch.experts.request(request)

    @property
    def model(self) -> Decoder:
        """The weights that are held here, for those who look at them."""
        return self._share.model

    def holdings(self) -> tuple[tuple[int, ...], ...]:
        """By mixture layer: the logical experts that are held here."""
        banks = self.model.banks.values()
        return tuple(tuple(sorted(expert for expert in bank.held if expert != EMPTY)) for bank in banks)

    def _next_view(self) -> View | None:
        """The newest view that is not served or lost yet; None to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or (self._wanted is not None and self._wanted.epoch != self._told.epoch)
            )
            self._interruption = Interruption()
            return None if self._stopping else self._wanted

    def _serve(self, view: View, outbox: Outbox) -> None:
        """One epoch, from its forming to its end."""
        interruption = self._interruption
        rank = view.rank_of(self._worker)
        if rank is None:
            self._tell(WorkerPhase.BROKEN, view.epoch, f"epoch {view.epoch} goes on without this worker")
            return
        self._tell(WorkerPhase.JOINING, view.epoch)
        meeting = Meeting(view, rank, self._store, self._hostname, interruption)
        begin_anew = partial(self._begin_anew, view.epoch, outbox)
        loads_LE = None if self._experts is None else [layer.load for layer in self._experts.report().layers]
        try:
            with formed(meeting, self._share, self._account, begin_anew, loads_LE) as epoch:
                if self._enter(epoch, interruption):
                    self._loop(epoch, outbox).run()
                    self._stopping = True  # the group has agreed to
        except Superseded:
            pass
        except ExpertsDoNotFit as error:  # until others come
            self._tell(WorkerPhase.BROKEN, view.epoch, str(error))
        except RuntimeError as error:
            if interruption.event.is_set():  # called away in the middle of something
                return
            if not isinstance(error, GroupBroken):
                raise
            self._tell(WorkerPhase.BROKEN, view.epoch, str(error))
        finally:
            self._epoch = None

    def _enter(self, epoch: Epoch, interruption: Interruption) -> bool:
        """From now on the epoch is what is woken, stopped and told of. False when there is no need any more."""
        with self._changed:
            if interruption.event.is_set():
                return False
            self._epoch, self._experts = epoch, epoch.experts
            if self._stopping:
                epoch.lockstep.stop()
            self._told = replace(self._told, spare_ranks=epoch.spare_ranks)
        self._tell(WorkerPhase.SERVING)
        return True

    def _loop(self, epoch: Epoch, outbox: Outbox) -> RankLoop:
        engine = Engine(self._scheduler, epoch.runner, self._share.limits)
        return RankLoop(engine, epoch.lockstep, epoch.experts, self._inbox, outbox, self._account)

    def _begin_anew(self, epoch: int, outbox: Outbox) -> None:
        """The ranks of this tensor-parallel set were parted in different turns: nobody can say which of them is right,
        so all go on with nothing."""
        reason = "its tensor-parallel ranks were parted in different turns"
        lost = [(sequence_id, reason) for sequence_id in self._scheduler.sequence_ids]
        self._scheduler = self._share.scheduler()
        self._account.begin_anew(epoch)
        outbox.put(StepOutput([], [], self._scheduler.load(), lost))
        outbox.flush()
        with self._changed:
            self._told = replace(self._told, lost_sequences=self._told.lost_sequences + len(lost))

    def _tell(self, phase: WorkerPhase, epoch: int | None = None, reason: str = "") -> None:
        with self._changed:
            told = self._told
            self._told = replace(told, phase=phase, epoch=told.epoch if epoch is None else epoch, reason=reason)
        log.info("worker %d: %s, epoch %d %s", self._worker, phase.value, self._told.epoch, reason)
        self._on_state(self.state)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
