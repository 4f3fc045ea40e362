"""How long prompts and outputs are: distributions over token counts.

Written as ``128`` (constant), ``uniform:min=16,max=512`` (inclusive), ``normal:mean=128,std=32`` or
``lognormal:mean=256,cv=1``. normal and lognormal take ``min`` and ``max`` as well: a draw is rounded to the nearest
integer and then clipped to [min, max] (min is 1 unless given), so mean, std and cv are those before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moestro.cluster.bench import options
from moestro.protos.errors import ConfigError

_LONGEST = 10_000_000  # tokens; far above any context, low enough that a slip of the keyboard fails here


@dataclass(frozen=True, slots=True)
class Constant:
    """Always ``value``."""

    value: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        return np.full(count, float(self.value))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number of [low, high] alike."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        return rng.integers(self.low, self.high, size=count, endpoint=True).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution by its mean and standard deviation."""

    mean: float
    std: float

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        return rng.normal(self.mean, self.std, size=count)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal distribution by the mean and the coefficient of variation (std / mean) of the lengths themselves,
    not of their logarithm."""

    mean: float
    cv: float

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        variance = math.log1p(self.cv**2)
        return rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), size=count)


Shape = Constant | Uniform | Normal | LogNormal


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts, clipped to [minimum, maximum]."""

    shape: Shape
    minimum: int = 1
    maximum: int | None = None

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """``count`` lengths in tokens."""
        drawn = np.rint(self.shape.draw(rng, count))
        return np.clip(drawn, self.minimum, self.maximum or _LONGEST).astype(np.int64)

    def __str__(self) -> str:
        match self.shape:
            case Constant(value):
                return str(value)
            case Uniform(low, high):
                return f"uniform:min={low},max={high}"
            case Normal(mean, std):
                text = f"normal:mean={mean:g},std={std:g},min={self.minimum}"
            case LogNormal(mean, cv):
                text = f"lognormal:mean={mean:g},cv={cv:g},min={self.minimum}"
        return text if self.maximum is None else f"{text},max={self.maximum}"


def parse_lengths(option: str, text: str) -> Lengths:
    """The distribution that ``text`` describes (see the top of this file). Raises ConfigError."""
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        value = _count(option, kind)
        return Lengths(Constant(value))
    if kind not in _KINDS:
        raise ConfigError(f"{option} must be a number or one of {', '.join(_KINDS)}, got {kind!r} in {text!r}")
    required, optional, build = _KINDS[kind]
    given = options.assignments(option, rest)
    for key in given:
        if key not in required + optional:
            raise ConfigError(f"{option}: {kind} takes {', '.join(required + optional)}, got {key!r} in {text!r}")
    for key in required:
        if key not in given:
            raise ConfigError(f"{option}: {kind} needs {key}, got {text!r}")
    return build(option, given)


def _count(option: str, text: str) -> int:
    value = options.whole(option, text)
    options.within(option, value, 1, _LONGEST)
    return value


def _ordered(option: str, low: int, high: int) -> None:
    if low > high:
        raise ConfigError(f"{option}: min must not exceed max, got min={low}, max={high}")


def _uniform(option: str, given: dict[str, str]) -> Lengths:
    low, high = _count(f"{option} min", given["min"]), _count(f"{option} max", given["max"])
    _ordered(option, low, high)
    return Lengths(Uniform(low, high), low, high)


def _clipped(option: str, shape: Shape, given: dict[str, str]) -> Lengths:
    low = _count(f"{option} min", given.get("min", "1"))
    high = _count(f"{option} max", given["max"]) if "max" in given else None
    _ordered(option, low, high or _LONGEST)
    return Lengths(shape, low, high)


def _mean(option: str, given: dict[str, str]) -> float:
    mean = options.number(f"{option} mean", given["mean"])
    options.within(f"{option} mean", mean, 1, _LONGEST)
    return mean


def _normal(option: str, given: dict[str, str]) -> Lengths:
    std = options.number(f"{option} std", given["std"])
    options.at_least(f"{option} std", std, 0)
    return _clipped(option, Normal(_mean(option, given), std), given)


def _lognormal(option: str, given: dict[str, str]) -> Lengths:
    cv = options.number(f"{option} cv", given["cv"])
    options.within(f"{option} cv", cv, 0, 100)
    return _clipped(option, LogNormal(_mean(option, given), cv), given)


_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[str, dict[str, str]], Lengths]]] = {
    "uniform": (("min", "max"), (), _uniform),
    "normal": (("mean", "std"), ("min", "max"), _normal),
    "lognormal": (("mean", "cv"), ("min", "max"), _lognormal),
}
