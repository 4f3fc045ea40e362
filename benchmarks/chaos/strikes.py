"""What each fault did, as seen from outside: pure functions of the cluster's own status and of the clients' records."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from benchmarks.chaos.records import Record

from moestro.cluster.client_results import ClusterStatus

NOT_SEEN_S = 10.0  # a fault that the status does not show for so long is taken for one that hurt no rank
STALLED_S = 0.5  # a stream without a message for so long is stalled


@dataclass(frozen=True, slots=True)
class Seen:
    """The cluster's status at one moment, as far as it matters here. Without an answer nothing of it is known."""

    at_s: float
    epochs: tuple[tuple[str, int], ...] = ()  # by group
    serving: int = 0  # ranks
    stragglers: int = 0
    open_streams: int = 0
    busy_blocks: int = 0
    answered: bool = True


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault. Times are None for what was not seen before the next fault came, or before the end."""

    number: int
    kind: str
    target: str
    at_s: float
    undone_s: float  # for a fault that does not last, the same as ``at_s``
    detected_s: float | None = None  # the status told of it: a rank that no longer serves, or another epoch
    whole_s: float | None = None  # all ranks serve
    named_s: float | None = None  # a straggler was named
    stayed_s: tuple[float, ...] = ()  # longest silence of each stream that was open and stayed with its rank
    moved_s: tuple[float, ...] = ()  # the same of those that went on elsewhere


def seen(at_s: float, status: ClusterStatus) -> Seen:
    ranks = [rank for group in status.groups for rank in group.ranks]
    return Seen(
        at_s,
        tuple((group.name, group.epoch) for group in status.groups),
        serving=sum(rank.state == "serving" for rank in ranks),
        stragglers=sum(rank.straggler for rank in ranks),
        open_streams=status.open_streams,
        busy_blocks=sum(rank.kv_blocks_used for rank in ranks),
    )


def followed(strikes: Sequence[Strike], history: Sequence[Seen], records: Sequence[Record], ranks: int) -> list[Strike]:
    """Each strike with what came of it, up to the next one."""
    done = []
    for number, strike in enumerate(strikes):
        ends_s = strikes[number + 1].at_s if number + 1 < len(strikes) else float("inf")
        before = last_before(history, strike.at_s)
        after = [each for each in history if strike.at_s < each.at_s < ends_s and each.answered]
        detected = _first(after, lambda each, known=before: _tells(known, each, ranks))
        whole = _first(after, lambda each, since=detected: since is not None and each.at_s >= since and
                       each.serving == ranks)  # fmt: skip
        named = _first(after, lambda each: each.stragglers > 0)
        calm_s = min(ends_s, (whole or strike.undone_s) + NOT_SEEN_S)
        hurt = [record for record in records if record.was_open(strike.at_s) and record.how != "whole"]
        done.append(
            replace(
                strike,
                detected_s=detected,
                whole_s=whole,
                named_s=named,
                stayed_s=tuple(record.stall_s(strike.at_s, calm_s) for record in hurt if not record.migrations),
                moved_s=tuple(record.stall_s(strike.at_s, calm_s) for record in hurt if record.migrations),
            )
        )
    return done


def last_before(history: Sequence[Seen], at_s: float) -> Seen | None:
    """The last answer by then. ``history`` is in the order of time."""
    end = bisect_right(history, at_s, key=lambda each: each.at_s)
    return next((history[each] for each in range(end - 1, -1, -1) if history[each].answered), None)


def is_whole(history: Sequence[Seen], at_s: float, ranks: int) -> bool:
    """Whether all ranks served, as the last answer before tells."""
    last = last_before(history, at_s)
    return last is not None and last.serving == ranks


def _tells(before: Seen | None, now: Seen, ranks: int) -> bool:
    return now.serving < ranks or (before is not None and now.epochs != before.epochs)


def _first(history: Iterable[Seen], holds: object) -> float | None:
    assert callable(holds)
    return next((each.at_s for each in history if holds(each)), None)


def tokens_per_s(records: Iterable[Record], edges_s: Sequence[float]) -> list[float]:
    """Tokens a second between each edge and the next; edges are evenly spaced."""
    width_s = edges_s[1] - edges_s[0]
    counts = [0] * (len(edges_s) - 1)
    for record in records:
        for at_s, tokens in zip(record.arrivals_s, record.tokens, strict=True):
            index = int((at_s - edges_s[0]) / width_s)
            if 0 <= index < len(counts):
                counts[index] += tokens
    return [count / width_s for count in counts]


def stalled(records: Iterable[Record], edges_s: Sequence[float]) -> list[int]:
    """At each edge the streams that have been open without a message for longer than ``STALLED_S``."""
    width_s = edges_s[1] - edges_s[0]
    counts = [0] * len(edges_s)
    for record in records:
        if record.how == "whole":
            continue  # says nothing before its end by design
        marks = [record.sent_s, *record.arrivals_s, record.ended_s]
        for begin, end in pairwise(marks):
            first = max(0, int((begin + STALLED_S - edges_s[0]) / width_s) + 1)
            for index in range(first, min(len(counts), int((end - edges_s[0]) / width_s) + 1)):
                counts[index] += 1
    return counts
