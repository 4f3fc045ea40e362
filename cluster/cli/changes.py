"""What an operator hears when groups and their ranks come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moestro.cluster.directory import GroupEntry, RankState


def changes(before: Sequence[GroupEntry], after: Sequence[GroupEntry]) -> list[str]:
    """A line for each group that no longer serves, that does now, or that does with other ranks."""
    then, now = {group.name: group for group in before}, {group.name: group for group in after}
    return [line for name in sorted(then | now) for line in _change(name, then.get(name), now.get(name))]


def _change(name: str, old: GroupEntry | None, new: GroupEntry | None) -> Iterator[str]:
    was, size = _serving(old), 0 if new is None else len(new.ranks)
    if new is None:
        if was or _drains(old):
            yield f"{name} has left"
    elif not new.is_serving:
        if was and not _drains(new):
            yield f"{name} is lost; Ray Serve starts it again"
    elif not was or (was == _serving(new) == size and old is not None and old.epoch != new.epoch):
        yield f"{name} serves, epoch {new.epoch}"
    elif was < _serving(new) == size:
        yield f"{name}: all {size} ranks serve again, epoch {new.epoch}"
    elif was != _serving(new):
        yield f"{name}: {_serving(new)} of {size} ranks serve"


def _serving(group: GroupEntry | None) -> int:
    return 0 if group is None else sum(rank.state is RankState.SERVING for rank in group.ranks)


def _drains(group: GroupEntry | None) -> bool:
    return group is not None and any(rank.state is RankState.DRAINING for rank in group.ranks)
