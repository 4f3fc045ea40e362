"""The readable log of a simulated run: when, who, what. Two runs of one seed write the same."""

from __future__ import annotations

import asyncio
import hashlib


class Trace:
    """Lines are made only when somebody reads them."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str, str, tuple[object, ...]]] = []

    def __call__(self, who: str, what: str, *details: object) -> None:
        """Adds an event at the loop's time. ``what`` is a format string of ``details``."""
        self.events.append((asyncio.get_running_loop().time(), who, what, details))

    def lines(self) -> list[str]:
        return [f"{at_s:10.6f}  {who:<18} {what.format(*details)}" for at_s, who, what, details in self.events]

    def digest(self) -> str:
        """The same for two runs that did the same."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]
