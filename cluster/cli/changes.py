"""What an operator hears when groups come and go."""

from __future__ import annotations

from collections.abc import Sequence

from moestro.cluster.directory import GroupEntry


def changes(before: Sequence[GroupEntry], after: Sequence[GroupEntry]) -> list[str]:
    """A line for each group that no longer serves, and for each that does now."""
    then = {group.name: group.epoch for group in before if group.is_serving}
    now = {group.name: group.epoch for group in after if group.is_serving}
    present = {group.name for group in after}
    gone = [name for name in sorted(then) if name not in now]
    lost = [f"{name} is lost; Ray Serve starts it again" if name in present else f"{name} has left" for name in gone]
    up = [f"{name} serves, epoch {epoch}" for name, epoch in sorted(now.items()) if then.get(name) != epoch]
    return lost + up
