"""What operators are told of a group's experts.

Legend: L mixture layers, E logical experts, R ranks, C slots of a rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.protos.experts import ExpertsReport, LayerExperts, RankExperts, RebalanceDecision, RebalancerState
from moestro.router.placement import Placement
from moestro.router.rebalance.ledger import Entry, Totals
from moestro.router.rebalance.messages import Ints, Observation
from moestro.router.rebalance.rebalancer import Rebalancer
from moestro.router.rebalance.tables import loads_by_expert, tabulate


@dataclass(frozen=True, slots=True)
class _Seen:
    """One observation as the report needs it."""

    observation: Observation
    loads_LE: Ints
    slowest_steps: tuple[int, ...]  # by rank


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Everything a report is made of; replaced whole, so that any thread may read it."""

    at_s: float  # of this rank's clock
    observed_s: float  # the same moment by the observations' clock
    seen: tuple[_Seen, ...]
    placements: tuple[Placement, ...]
    state: RebalancerState
    entries: tuple[Entry, ...]


class Reporter:
    """``saw`` and ``publish`` belong to the engine's thread, ``report`` to any."""

    def __init__(
        self,
        architecture: str,
        layers: Sequence[int],
        placements: tuple[Placement, ...],
        seats: Sequence[int],
        window_s: float,
    ) -> None:
        """``layers``: of the decoder, those with a mixture. ``seats``: by rank, what operators call it."""
        self._architecture = architecture
        self._layers, self._seats = tuple(layers), tuple(seats)
        self._window_s = window_s
        self._placements, self._tables = placements, tabulate(placements)
        self._seen: deque[_Seen] = deque()
        self._snapshot: _Snapshot | None = None

    def saw(self, observation: Observation, placements: tuple[Placement, ...], slowest_steps: Sequence[int]) -> None:
        """Adds what came since the last observation, under the placements it was computed by."""
        if placements is not self._placements:  # tables take milliseconds to make, and placements seldom change
            self._placements, self._tables = placements, tabulate(placements)
        loads_LE = loads_by_expert(self._tables, observation.rows_LRC)
        self._seen.append(_Seen(observation, loads_LE, tuple(slowest_steps)))
        while self._seen[0].observation.now < observation.now - self._window_s:
            self._seen.popleft()

    def publish(self, rebalancer: Rebalancer, now_s: float) -> None:
        """Makes what is known now the next report."""
        self._snapshot = _Snapshot(
            time.monotonic(),
            now_s,
            tuple(self._seen),
            rebalancer.placements,
            _state(rebalancer.paused, rebalancer.state, rebalancer.ledger.totals),
            tuple(rebalancer.ledger),
        )

    def report(self) -> ExpertsReport:
        """The newest report."""
        snapshot = self._snapshot
        assert snapshot is not None, "publish comes first"
        num_experts, capacity = snapshot.placements[0].num_experts, snapshot.placements[0].capacity
        num_ranks, seen = snapshot.placements[0].num_ranks, snapshot.seen
        load_LE = sum((one.loads_LE for one in seen), np.zeros((len(self._layers), num_experts), np.int64))
        rows_LR = sum(
            (one.observation.rows_LRC.sum(2) for one in seen), np.zeros((len(self._layers), num_ranks), np.int64)
        )
        now_s = snapshot.observed_s + time.monotonic() - snapshot.at_s
        return ExpertsReport(
            architecture=self._architecture,
            num_experts=num_experts,
            slots_per_rank=capacity,
            window_s=self._window_s,
            layers=tuple(
                LayerExperts(layer, tuple(load_E.tolist()), placement.slots, tuple(rows_R.tolist()))
                for layer, load_E, placement, rows_R in zip(
                    self._layers, load_LE, snapshot.placements, rows_LR, strict=True
                )
            ),
            ranks=tuple(_rank(rank, self._seats[rank], seen, int(rows_LR[:, rank].sum())) for rank in range(num_ranks)),
            rebalancer=snapshot.state,
            decisions=tuple(self._decision(entry, now_s) for entry in snapshot.entries),
        )

    def _decision(self, entry: Entry, now_s: float) -> RebalanceDecision:
        return RebalanceDecision(
            age_s=now_s - (entry.last_at or entry.at),
            trigger=entry.trigger.value,
            layers=() if entry.layer is None else (self._layers[entry.layer],),
            reason=f"{entry.reason} {entry.verdict}".strip(),
            outcome=entry.outcome.value,
            num_bytes=entry.bytes,
            predicted_gain_s=entry.predicted_s or 0.0,
            predicted_cost_s=entry.cost_s or 0.0,
            stall_s=entry.stall_s or 0.0,
            realised_gain_s=entry.realised_s,
            times=entry.times,
        )


def _rank(rank: int, seat: int, seen: Sequence[_Seen], rows: int) -> RankExperts:
    observations = [one.observation for one in seen]
    return RankExperts(
        rank=seat,
        rows=rows,
        expert_s=float(sum(one.experts_s_R[rank] for one in observations)),
        wait_s=float(sum(one.waiting_s_R[rank] for one in observations)),
        step_s=float(sum(one.steps_s_R[rank] for one in observations)),
        num_steps=sum(one.steps for one in observations),
        num_slowest=sum(one.slowest_steps[rank] for one in seen),
        tokens=int(sum(one.tokens_R[rank] for one in observations)),
    )


def _state(paused: bool, activity: str, totals: Totals) -> RebalancerState:
    return RebalancerState(not paused, activity, totals.bytes, totals.moves, totals.undone)
