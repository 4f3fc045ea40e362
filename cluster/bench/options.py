"""Reading option values: small parsers whose errors name the option, the bound and the value."""

from __future__ import annotations

import math
import re

from moestro.protos.errors import ConfigError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(us|ms|s|m)\s*")


def at_least(option: str, value: float, bound: float) -> None:
    """Raises ConfigError unless ``value >= bound`` (NaN never is)."""
    if not value >= bound:
        raise ConfigError(f"{option} must be at least {bound:g}, got {value:g}")


def within(option: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ConfigError(f"{option} must be between {low:g} and {high:g}, got {value:g}")


def positive(option: str, value: float) -> None:
    """Raises ConfigError unless ``value`` is finite and above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{option} must be a finite number above 0, got {value:g}")


def number(option: str, text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{option} must be a finite number, got {text!r}")
    return value


def whole(option: str, text: str) -> int:
    """A whole number."""
    value = number(option, text)
    if value != int(value):
        raise ConfigError(f"{option} must be a whole number, got {text!r}")
    return int(value)


def seconds(option: str, text: str) -> float:
    """A duration with its unit (``500ms``, ``2s``, ``1.5m``), in seconds. A bare number is refused."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} must be a number with a unit of us, ms, s or m (such as 500ms), got {text!r}")
    value = float(match[1]) * _UNITS[match[2]]
    positive(option, value)
    return value


def assignments(option: str, text: str) -> dict[str, str]:
    """``a=1,b=2`` as a dictionary; an item without ``=`` and a repeated key are refused."""
    found: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise ConfigError(
                f"{option} must be name=value pairs separated by commas, got {item.strip()!r} in {text!r}"
            )
        if key in found:
            raise ConfigError(f"{option} gives {key} twice: {text!r}")
        found[key] = value
    return found
