"""A group as its supervisor shows it to the directory. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moestro.cluster.directory import GroupEntry, RankEntry, RankState
from moestro.cluster.membership import Membership
from moestro.cluster.membership_records import Tracked
from moestro.cluster.ranks.report import UNHEARD, RankReport


def picture(entry: GroupEntry, membership: Membership, reports: Mapping[int, RankReport]) -> GroupEntry:
    """The entry brought up to date. Seats of members stay SERVING while a view forms: what they run waits there."""
    epoch = membership.view.epoch if membership.view is not None and membership.is_settled else entry.epoch
    tp = membership.config.shape.tp
    ranks = []
    for seat in range(membership.config.shape.world_size):
        worker = membership.worker_at(seat)
        report = UNHEARD if worker is None else reports.get(worker.number, UNHEARD)
        ranks.append(
            RankEntry(
                seat // tp,
                seat % tp,
                state_of(membership, worker),
                address=report.address,
                loaded_bytes=report.loaded_bytes,
                total_bytes=report.total_bytes,
                device=report.device,
                resident_bytes=report.resident_bytes,
            )
        )
    return replace(
        entry,
        epoch=epoch,
        ranks=tuple(ranks),
        forming=membership.view is not None and not membership.is_settled,
        activity=activity(membership),
        spare_ranks=membership.spare_ranks,
        recovery=membership.totals,
    )


def state_of(membership: Membership, worker: Tracked | None) -> RankState:
    """Of a seat, by who is in it."""
    if worker is None:
        return RankState.LOST
    if not worker.has_served:
        return RankState.STARTING
    return RankState.DRAINING if membership.is_leaving else RankState.SERVING


def activity(membership: Membership) -> str:
    """What a group does beside serving at full strength, in words."""
    if membership.view is None:
        return membership.given_up or "starting"
    size = membership.config.shape.world_size
    words = [f"draining: {membership.given_up}" if membership.given_up else "draining"] * membership.is_leaving
    if not membership.is_settled:
        words.append(f"forming epoch {membership.view.epoch} from {len(membership.members())} of {size} ranks")
    words += [_of_seat(membership, seat) for seat in range(size)]
    return ", ".join(filter(None, words))


def _of_seat(membership: Membership, seat: int) -> str:
    worker, history = membership.worker_at(seat), membership.history(seat)
    if worker is not None:
        return "" if worker.is_called else f"rank {seat} restarting"
    if not membership.config.replace or membership.is_leaving or not history.failures:
        return f"rank {seat} lost"
    return f"rank {seat} restarts after {history.pause_s:.0f} s: {history.fault}"
