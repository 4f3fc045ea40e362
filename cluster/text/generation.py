"""The sampling a checkpoint recommends, from generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.protos.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request that does not say otherwise is sampled with.

    A field missing from the file is neutral (no top_k of 50, as transformers would assume), and ``do_sample: false``
    written out means temperature 0. ``eos_token_ids`` is the union of what generation_config.json, config.json and the
    tokenizer name, ascending: instruct checkpoints name end-of-turn in one and end-of-text in another, and serving
    engines end at either.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def generation_defaults(
    generation_path: Path,
    generation: Mapping[str, Any],
    config_path: Path,
    config: Mapping[str, Any],
    tokenizer_eos_id: int | None,
) -> GenerationDefaults:
    """Read and check the defaults. CheckpointError names file, field, bound and value."""
    read = _Reader(generation_path, generation)
    temperature = read.number("temperature", 1.0, 0.0, math.inf)
    text_config = config.get("text_config")
    nested = text_config.get("eos_token_id") if isinstance(text_config, dict) else None
    eos = {
        *_token_ids(generation_path, generation.get("eos_token_id")),
        *_token_ids(config_path, config.get("eos_token_id", nested)),
        *(() if tokenizer_eos_id is None else (tokenizer_eos_id,)),
    }
    return GenerationDefaults(
        temperature=0.0 if generation.get("do_sample") is False else temperature,
        top_k=read.integer("top_k", 0, 0) or 0,
        top_p=read.number("top_p", 1.0, 0.0, 1.0, above=True),
        min_p=read.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=read.number("repetition_penalty", 1.0, 0.0, math.inf, above=True),
        max_new_tokens=read.integer("max_new_tokens", None, 1),
        eos_token_ids=tuple(sorted(eos)),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    path: Path
    values: Mapping[str, Any]

    def number(self, name: str, default: float, low: float, high: float, above: bool = False) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {name} must be a number, is {value!r}")
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise CheckpointError(f"{self.path}: {name} must be in {'(' if above else '['}{low}, {high}], is {value!r}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise CheckpointError(f"{self.path}: {name} must be an integer of at least {low}, is {value!r}")
        return value


def _token_ids(path: Path, value: Any) -> tuple[int, ...]:
    values = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, is {value!r}")
    return values
