"""What must hold of the epochs of every group, whoever sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Epochs:
    """Hears what workers tell of themselves. What does not hold goes to ``fail``, since many who call catch whatever
    they hear from a process that may be dying."""

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        self._fail = fail
        self._last: dict[str, int] = {}  # by process
        self._views: dict[tuple[str, int], object] = {}  # by group and epoch
        self._placements: dict[tuple[str, int], object] = {}

    def observe(self, process: str, what: str, facts: Mapping[str, Any]) -> None:
        """``process`` is named group/worker."""
        group = process.split("/")[0]
        match what:
            case "state":
                self._require(facts["epoch"] >= self._last.get(process, 0), f"{process} went back in its epochs")
                self._last[process] = facts["epoch"]
            case "view":
                view = facts["view"]
                known = self._views.setdefault((group, view.epoch), view)
                self._require(known == view, f"two views in epoch {view.epoch} of {group}")
            case "placed":
                placements = facts["placements"]
                known = self._placements.setdefault((group, facts["epoch"]), placements)
                self._require(known == placements, f"two placements in epoch {facts['epoch']} of {group}")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self._fail(AssertionError(otherwise))
