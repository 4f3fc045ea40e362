"""The line a person needs, out of the tracebacks that Ray and Serve report."""

from __future__ import annotations

import re

MAX_CHARS = 500
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Failed|Timeout)): (?P<reason>.+)$")
_OURS = ("CheckpointError", "ConfigError", "GroupFailed")
_WRAPPERS = ("RayTaskError", "RayActorError", "ActorDiedError", "RayTaskError")


def reason_in(report: str) -> str:
    """What was raised, from a report with tracebacks: one of our own errors if there is one, then by its message alone,
    which may quote another; else the last exception; else the report's last line."""
    lines = [line.strip() for line in _ESCAPES.sub("", report).splitlines()]
    raised = [match for line in lines if (match := _RAISED.match(line))]
    for match in raised:
        if match["kind"] in _OURS:
            quoted = _RAISED.match(match["reason"])
            return (quoted if quoted and quoted["kind"] in _OURS else match)["reason"][:MAX_CHARS]
    named = [match for match in raised if match["kind"] not in _WRAPPERS] or raised
    if named:
        return f"{named[-1]['kind']}: {named[-1]['reason']}"[:MAX_CHARS]
    return next((line for line in reversed(lines) if line), "no reason given")[:MAX_CHARS]
