"""Placements as a file, so that a server can start with what another has learnt.

JSON: ``format``, ``version``, ``model`` (``architecture``, ``num_layers``, ``num_experts``), ``world_size``,
``capacity`` and ``layers``: by mixture layer, rank and slot the expert, or -1. A file is for one model and one shape of
group; a placement for another is refused, never adapted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.protos.errors import ConfigError
from moestro.router.placement import Placement

FORMAT = "moestro placement"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What a placement is for. ``num_layers`` counts mixture layers only."""

    architecture: str
    num_layers: int
    num_experts: int
    world_size: int
    capacity: int


def save_placements(path: Path, shape: Shape, placements: Sequence[Placement]) -> None:
    """Writes or replaces the file at once: a reader finds the old content or the new. Raises ValueError for placements
    of another shape, OSError when the file cannot be written."""
    if len(placements) != shape.num_layers:
        raise ValueError(f"placements must have {shape.num_layers} layers, got {len(placements)}")
    expected = (shape.num_experts, shape.world_size, shape.capacity)
    for layer, placement in enumerate(placements):
        found = (placement.num_experts, placement.num_ranks, placement.capacity)
        if found != expected:
            raise ValueError(f"placements[{layer}]: experts, ranks and capacity must be {expected}, got {found}")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "architecture": shape.architecture,
            "num_layers": shape.num_layers,
            "num_experts": shape.num_experts,
        },
        "world_size": shape.world_size,
        "capacity": shape.capacity,
        "layers": [placement.slots for placement in placements],
    }
    _replace(path, json.dumps(content) + "\n")


def load_placements(path: Path, shape: Shape) -> tuple[Placement, ...]:
    """By mixture layer. Raises ConfigError naming the file and what is wrong where: not such a file, a newer version,
    another model, world size or capacity, an expert that is out of range, missing, or twice on a rank."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON (is it complete?): {error}") from None
    try:
        return _parse(content, shape)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(content: object, shape: Shape) -> tuple[Placement, ...]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'not a placement file: it has no "format": "{FORMAT}"')
    version = _integer(content, "version", "version")
    if version != VERSION:
        raise ValueError(f"version must be {VERSION}, got {version}")
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"model must be an object, got {_shown(model)}")
    if model.get("architecture") != shape.architecture:
        raise ValueError(
            f"model.architecture: this model is {shape.architecture}, got {_shown(model.get('architecture'))}"
        )
    for field, found, expected in (
        ("model.num_layers", _integer(model, "num_layers", "model.num_layers"), shape.num_layers),
        ("model.num_experts", _integer(model, "num_experts", "model.num_experts"), shape.num_experts),
        ("world_size", _integer(content, "world_size", "world_size"), shape.world_size),
        ("capacity", _integer(content, "capacity", "capacity"), shape.capacity),
    ):
        if found != expected:
            raise ValueError(f"{field} must be {expected} here, got {found}")
    layers = _list(content.get("layers"), "layers", shape.num_layers)
    return tuple(_layer(layer, f"layers[{number}]", shape) for number, layer in enumerate(layers))


def _layer(layer: object, name: str, shape: Shape) -> Placement:
    ranks = _list(layer, name, shape.world_size)
    slots = tuple(_rank(rank, f"{name}[{number}]", shape.capacity) for number, rank in enumerate(ranks))
    try:
        return Placement(shape.num_experts, slots)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _rank(rank: object, name: str, capacity: int) -> tuple[int, ...]:
    slots = _list(rank, name, capacity)
    for number, expert in enumerate(slots):
        if type(expert) is not int:  # in JSON true is no number
            raise ValueError(f"{name}[{number}] must be an integer, got {_shown(expert)}")
    return tuple(slots)


def _list(value: object, name: str, length: int) -> list[Any]:
    """The elements are whatever was in the file; the callers check them."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {_shown(value)}")
    if len(value) != length:
        raise ValueError(f"{name} must have {length} entries, got {len(value)}")
    return value


def _integer(fields: dict[str, object], key: str, name: str) -> int:
    value = fields.get(key)
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _replace(path: Path, text: str) -> None:
    """Through a file beside it, on the disk before it takes the name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
