"""What a part of the suite says: one check after the other, each with its figures or the reason why it failed."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """The same for every part. ``small`` shrinks every part to seconds on a CPU; its figures mean nothing."""

    device: Literal["cuda", "cpu"] = "cuda"
    small: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """``omitted`` is only for what the device that was asked for cannot have (a CUDA check with ``--device cpu``)."""

    name: str
    status: Literal["passed", "failed", "omitted"]
    values: Values = field(default_factory=dict)
    reason: str | None = None

    def record(self) -> Values:
        """Ready for strict JSON."""
        return {key: value for key, value in _finite(asdict(self)).items() if value not in (None, {})}


class Unmet(Exception):
    """An expectation that did not hold, with the figures that say so."""

    def __init__(self, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.values = values


def attempt(name: str, call: Callable[[], Values]) -> Check:
    """Runs one check; whatever it raises is recorded, so that the next can follow."""
    try:
        return Check(name, "passed", call())
    except Unmet as unmet:
        return Check(name, "failed", unmet.values, str(unmet))
    except Exception as error:
        return Check(name, "failed", {}, f"{why(error)} ({_where(error)})")


def on_cuda_only(name: str, settings: Settings, call: Callable[[], Values]) -> Check:
    """``attempt`` for what has no meaning on a CPU."""
    if settings.device != "cuda":
        return Check(name, "omitted", reason=f"needs CUDA, and the suite was asked to run on {settings.device}")
    return attempt(name, call)


def why(error: BaseException) -> str:
    """The kind of an error and the first lines of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()][:3]
    return f"{type(error).__name__}: {' | '.join(lines)}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
