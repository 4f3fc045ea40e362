"""The simulation finds what it is there to find: bugs planted one by one, each within some seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count

import pytest

from moestro.cluster.delta_streams import DeltaStreams, QueuedDeltas
from moestro.cluster.edge.history import Arrived
from moestro.cluster.edge.journal import Journal
from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Form
from moestro.cluster.simulation.experts import Experts
from moestro.cluster.simulation.run import SimulationFailed, simulate
from moestro.protos.sequences import SequenceDelta, SequenceRequest
from moestro.router.placement import Placement
from moestro.workers.scheduler import Scheduler
from moestro.workers.scheduler_sequence import SequenceState, StepPlan
from moestro.workers.scheduler_tables import TableManager


def found(seeds: Iterable[int]) -> str:
    """What the first seed that fails says; empty when none does."""
    for seed in seeds:
        try:
            simulate(seed)
        except SimulationFailed as failed:
            return str(failed)
    return ""


def delivers_some_deltas_twice(patch: pytest.MonkeyPatch) -> None:
    put, counter = QueuedDeltas.put, count(1)

    def planted(self: QueuedDeltas, delta: SequenceDelta) -> None:
        put(self, delta)
        if next(counter) % 7 == 0 and delta.finish_reason is None:
            put(self, delta)

    patch.setattr(QueuedDeltas, "put", planted)


def replays_without_the_last_token(patch: pytest.MonkeyPatch) -> None:
    restart = Journal.restart

    def planted(self: Journal, now_s: float) -> list[SequenceRequest]:
        return [replace(each, output_ids=each.output_ids[:-1]) for each in restart(self, now_s)]

    patch.setattr(Journal, "restart", planted)


def finds_blocks_of_a_step_that_broke_off(patch: pytest.MonkeyPatch) -> None:
    release = TableManager.release
    patch.setattr(TableManager, "release", lambda self, sequence, forget_from=None: release(self, sequence))


def does_not_tell_streams_of_a_lost_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeltaStreams, "fail", lambda self, failure: None)


def loses_what_ran_when_a_turn_breaks(patch: pytest.MonkeyPatch) -> None:
    abandon = Scheduler.abandon

    def planted(self: Scheduler, plan: StepPlan) -> None:
        abandon(self, plan)
        self._waiting.clear()
        self._by_id.clear()

    patch.setattr(Scheduler, "abandon", planted)


def forms_another_view_of_the_same_epoch(patch: pytest.MonkeyPatch) -> None:
    form = Membership._form

    def planted(self: Membership, now_s: float) -> Form:
        if self.view is not None:
            self._next_epoch = self.view.epoch
        return form(self, now_s)

    patch.setattr(Membership, "_form", planted)


def resumes_one_event_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Arrived, "next_number", property(lambda self: self.last_number or 0))


def leaks_blocks_of_cancelled_sequences(patch: pytest.MonkeyPatch) -> None:
    release = TableManager.release

    def planted(self: TableManager, sequence: SequenceState, forget_from: int | None = None) -> None:
        if not sequence.is_cancelled:
            release(self, sequence, forget_from)

    patch.setattr(TableManager, "release", planted)


def places_experts_each_in_its_own_way(patch: pytest.MonkeyPatch) -> None:
    rehomed, counter = Experts.rehomed, count()

    def planted(self: Experts, held: Sequence[Sequence[Sequence[int]]]) -> tuple[Placement, ...]:
        right = rehomed(self, held)
        return right if next(counter) % 2 else tuple(Placement(p.num_experts, p.slots[::-1]) for p in right)

    patch.setattr(Experts, "rehomed", planted)


def forgets_a_token_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    """The second bug of preemption: a sequence that comes back believes that more is computed than is."""
    admit = Scheduler._admit

    def planted(self: Scheduler, index: int, now: float) -> bool:
        admitted = admit(self, index, now)
        sequence = self._running[index] if admitted else None
        if sequence is not None and sequence.num_preemptions and sequence.num_computed + 1 < len(sequence.token_ids):
            sequence.num_computed += 1
        return admitted

    patch.setattr(Scheduler, "_admit", planted)


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    delivers_some_deltas_twice: "said|ended early|IndexError|more after",
    replays_without_the_last_token: "said",
    finds_blocks_of_a_step_that_broke_off: "said",
    does_not_tell_streams_of_a_lost_rank: "has not ended",
    loses_what_ran_when_a_turn_breaks: "has not ended",
    forms_another_view_of_the_same_epoch: "two views",
    resumes_one_event_too_early: "was to come|was due",
    leaks_blocks_of_cancelled_sequences: "differ from holders",
    places_experts_each_in_its_own_way: "do not agree",
    forgets_a_token_in_the_cache: "said|no room",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert re.search(PLANTED[plant], found(range(60)))
