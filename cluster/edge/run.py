"""One request's run, on one engine after another: what is lost with an engine goes on elsewhere, from the journal."""

from __future__ import annotations

import asyncio
import logging

from moestro.cluster.backend import Backend, DeltaStream
from moestro.cluster.edge.events import StreamEvent
from moestro.cluster.edge.incidents import Death, Incidents
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.served import RecoveryLimits
from moestro.cluster.edge.suspects import Suspects, Trial
from moestro.protos.errors import EngineLost, Overloaded, Quarantined, Unavailable
from moestro.protos.sequences import SequenceDelta

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5  # between two tries to start a replay


class Recovery:
    """What the runs of one edge share, and what happened to them since its start."""

    def __init__(self, limits: RecoveryLimits) -> None:
        self.limits = limits
        self.suspects = Suspects()
        self.incidents = Incidents(limits.max_incidents)
        self.num_losses = 0  # of engines, one for every run they had
        self.num_quarantined = 0
        self.num_resumed = 0  # streams that were cut off and taken up again


class Run:
    """What feeds a journal: ``deltas`` of the present engine, ``accept`` for what they say, and ``recover`` when they
    end before the request does."""

    def __init__(self, journal: Journal, backend: Backend, recovery: Recovery) -> None:
        self._journal = journal
        self._backend = backend
        self._recovery = recovery
        self._limits = recovery.limits
        self._deltas: DeltaStream | None = None
        self._loss: EngineLost | None = None  # until the replay tells something
        self._patience_ends_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._trial: Trial | None = None
        self._deaths: list[Death] = []  # since it last got anywhere
        self._closed = False
        self._recovering: asyncio.Task[object] | None = None
        self._now = asyncio.get_running_loop().time

    @property
    def deltas(self) -> DeltaStream:
        """Of a run that was started and has not ended."""
        assert self._deltas is not None
        return self._deltas

    def start(self) -> None:
        """Raises what ``Backend.start`` raises, with nothing started."""
        if sequences := self._journal.sequences():
            self._deltas = self._backend.start(sequences)

    def accept(self, deltas: list[SequenceDelta]) -> StreamEvent | None:
        """What they make the caller be told. Raises as ``Journal.accept``."""
        event, cancel = self._journal.accept(deltas, self._now())
        for sequence_id in cancel:
            self.deltas.cancel(sequence_id)
        if self._loss is not None:
            self._loss, self._pause_s = None, FIRST_PAUSE_S
        if self._trial is not None and not self._journal.num_deaths:
            self._end_trial()
            self._deaths.clear()
        return event

    async def recover(self, failure: EngineLost | Overloaded) -> None:
        """Goes on elsewhere. Raises the failure when the first engine would not take it on, Quarantined, and
        Unavailable when nobody takes it over, it was lost too often, or it is closed."""
        self._drop()
        if self._closed:
            raise failure
        if isinstance(failure, Overloaded) and self._loss is None:
            raise failure
        self._recovering = asyncio.current_task()
        try:
            if isinstance(failure, EngineLost):
                await self._lose(failure)
            else:
                self._journal.interrupt(self._now())
                await self._pause(failure)  # an admitted request is not lost to a full queue
            await self._go_on()
        except asyncio.CancelledError:
            if self._closed and self._recovering is not None:
                self._recovering.uncancel()
                raise Unavailable("the stream was closed") from failure
            raise
        finally:
            self._recovering = None

    def num_unread(self) -> int:
        return 0 if self._deltas is None else self._deltas.num_unread()

    def close(self) -> None:
        """Cancels what still runs; who waits for it is told. Idempotent."""
        self._closed = True
        self._drop()
        self._end_trial()
        if self._recovering is not None:
            self._recovering.cancel()

    async def _lose(self, loss: EngineLost) -> None:
        """Raises Quarantined or Unavailable when it must not be tried again."""
        now_s, journal = self._now(), self._journal
        journal.lose(loss.died, now_s)
        self._recovery.num_losses += 1
        if loss.died:
            self._deaths.append(Death(loss.engine, str(loss), now_s))
            if journal.num_deaths >= 2 and self._trial is not None and self._trial.was_alone:
                self._deaths = [death for death in self._deaths if not await self._backend.outlived(death.engine)]
                if len(self._deaths) >= 2:
                    raise self._quarantine() from loss
        self._end_trial()
        if self._loss is None:
            self._patience_ends_s = now_s + self._limits.patience_s
        self._loss = loss
        if journal.num_migrations > self._limits.migrations:
            bound = f"{self._limits.migrations} times is the most that a request goes on elsewhere"
            raise Unavailable(f"its rank was lost {journal.num_migrations} times; {bound}") from loss

    async def _go_on(self) -> None:
        """Starts the replay as soon as somebody takes it."""
        try:
            async with asyncio.timeout_at(self._patience_ends_s):
                if self._trial is None and self._journal.num_deaths:
                    self._trial = await self._recovery.suspects.begin(self._journal.num_deaths)
                while self._deltas is None:
                    await self._backend.available()
                    try:
                        self._deltas = self._backend.start(self._journal.restart(self._now()))
                    except (Overloaded, Unavailable) as refusal:
                        await self._pause(refusal)
        except TimeoutError:
            raise Unavailable(f"no rank took the request over within {self._limits.patience_s:g} s") from self._loss

    async def _pause(self, refusal: Overloaded | Unavailable) -> None:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        await asyncio.sleep(min(pause_s, refusal.retry_after_s))

    def _quarantine(self) -> Quarantined:
        num_tokens = tuple(len(choice.output_ids) for choice in self._journal.choices)
        incident = self._recovery.incidents.add(self._journal.admitted, num_tokens, tuple(self._deaths))
        self._recovery.num_quarantined += 1
        log.error("quarantined: %s", incident)
        return incident.verdict()

    def _drop(self) -> None:
        if self._deltas is not None:
            self._deltas.close()
            self._deltas = None

    def _end_trial(self) -> None:
        if self._trial is not None:
            self._recovery.suspects.end(self._trial)
            self._trial = None
