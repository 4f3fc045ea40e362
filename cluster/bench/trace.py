"""Workloads recorded elsewhere: JSON Lines, one request a line.

``{"input_tokens": 812, "output_tokens": 64, "arrival_s": 0.35}``; ``arrival_s`` counts from the start of the trace and
is given on every line or on none. Other fields are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from moestro.protos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Trace:
    """Lengths in tokens by request, and arrival times in seconds when the trace has them."""

    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    arrivals_s: tuple[float, ...] | None


def parse_trace(option: str, lines: Iterable[str]) -> Trace:
    """The trace in ``lines``; empty lines are skipped. Raises ConfigError naming line and field."""
    inputs: list[int] = []
    outputs: list[int] = []
    arrivals: list[float] = []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{option} line {line_number}"
        entry = _entry(where, line)
        inputs.append(_count(where, entry, "input_tokens"))
        outputs.append(_count(where, entry, "output_tokens"))
        if "arrival_s" in entry:
            arrivals.append(_time(where, entry["arrival_s"], arrivals[-1] if arrivals else 0.0))
        if arrivals and len(arrivals) != len(inputs):
            raise ConfigError(f"{where}: arrival_s must be on every line or on none")
    if not inputs:
        raise ConfigError(f"{option} must hold at least one request, got an empty file")
    return Trace(tuple(inputs), tuple(outputs), tuple(arrivals) or None)


def _entry(where: str, line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a JSON object, got {line.strip()[:60]!r}")
    return entry


def _count(where: str, entry: dict[str, object], field: str) -> int:
    value = entry.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {field} must be a whole number of at least 1, got {value!r}")
    return value


def _time(where: str, value: object, previous: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not previous <= value < math.inf:
        raise ConfigError(
            f"{where}: arrival_s must be a number of at least {previous:g} (the line before), got {value!r}"
        )
    return float(value)
