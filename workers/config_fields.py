"""Typed reading of a ``config.json``: every error names the file, the field and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moestro.protos.errors import CheckpointError
from moestro.workers.model_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object. ``None`` and absent are the same: both mean the default, and without one an error."""

    raw: Mapping[str, object]
    source: str  # file, and the path within it

    def error(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name} {reason}")

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0.0) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
            raise self.error(name, f"must be a finite number above {above}, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, or one integer for a list of one; empty when absent."""
        value = self.raw.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.error(name, f"must be an integer or a list of integers, not {value!r}")
        return tuple(values)

    def strings(self, name: str) -> tuple[str, ...] | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(v, str) for v in value):
            raise self.error(name, f"must be a list of strings, not {value!r}")
        return tuple(value)

    def child(self, name: str) -> Fields | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return Fields(value, f"{self.source}: {name}")


def parse_dtype(fields: Fields) -> torch.dtype:
    """``dtype`` (transformers 5) or ``torch_dtype`` (before); fp32 when neither is there, as transformers has it."""
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    value = fields.raw.get(name) or "float32"
    if value not in _DTYPES:
        raise fields.error(name, f"must be one of {', '.join(_DTYPES)}, not {value!r}")
    return _DTYPES[str(value)]


def parse_rope(fields: Fields, head_dim: int, default_theta: float, partial_rotary: float | None) -> RopeSpec:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` with ``rope_scaling`` (before). ``partial_rotary`` is the
    default of ``partial_rotary_factor``, None for a class that rotates whole heads."""
    max_position = fields.integer("max_position_embeddings")
    scaling = fields.child("rope_parameters") or fields.child("rope_scaling") or Fields({}, fields.source)
    theta = scaling.number("rope_theta", fields.number("rope_theta", default_theta))
    rotated = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", partial_rotary or 1.0))
    if rotated > 1.0 or (rotated != 1.0 and partial_rotary is None):
        allowed = "1, since this architecture rotates whole heads" if partial_rotary is None else "at most 1"
        raise scaling.error("partial_rotary_factor", f"must be {allowed}, not {rotated}")
    rotary_dim = int(head_dim * rotated)
    if rotary_dim % 2 or rotary_dim == 0:
        raise fields.error("head_dim", f"must have an even part for rope, not {rotary_dim} of {head_dim}")
    return RopeSpec(theta, rotary_dim, _parse_scaling(scaling, max_position))


def _parse_scaling(fields: Fields, max_position: int) -> RopeScaling | None:
    kind = fields.raw.get("rope_type") or fields.raw.get("type") or "default"
    original = fields.integer("original_max_position_embeddings", max_position)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(fields.number("factor"))
        case "dynamic":
            return DynamicScaling(fields.number("factor"), max_position)
        case "llama3":
            low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
            if low >= high:
                raise fields.error("high_freq_factor", f"must be above low_freq_factor {low}, not {high}")
            return Llama3Scaling(fields.number("factor"), low, high, original)
        case "yarn":
            factor = fields.number("factor", max_position / original)
            return YarnScaling(
                factor,
                original,
                fields.number("attention_factor", _yarn_attention_factor(fields, factor)),
                fields.number("beta_fast", 32.0),
                fields.number("beta_slow", 1.0),
                fields.flag("truncate", True),
            )
    raise fields.error("rope_type", f"must be default, linear, dynamic, llama3 or yarn, not {kind!r}")


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if fields.raw.get("mscale") and fields.raw.get("mscale_all_dim"):
        return temperature(fields.number("mscale")) / temperature(fields.number("mscale_all_dim"))
    return temperature(1.0)
