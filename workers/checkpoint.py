"""A Hugging Face checkpoint folder, checked from its headers alone: nothing is loaded here.

What cannot be served is refused with a CheckpointError that names file, tensor and reason. Nothing from a checkpoint is
ever run, and pickled weights are never opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moestro.protos.errors import CheckpointError
from moestro.workers.architectures import Architecture, architecture_of, parse_config
from moestro.workers.model.weights import tensor_shapes
from moestro.workers.model_config import ModelConfig
from moestro.workers.safetensors_header import TensorInfo, read_header

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = ("F32", "BF16", "F16")
_EXPERT = re.compile(r"(?P<prefix>.*\.experts\.)(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")
_ANY_EXPERT = re.compile(r"model\.layers\.(?P<layer>\d+)\..*\bexperts\.(?P<expert>\d+)\..*")  # of any architecture
_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old releases of transformers saved


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one of our tensors lies: ``shape[0]`` rows from ``row`` on of a tensor in a file, seen as a matrix."""

    info: TensorInfo
    row: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that can be served: its config, and a place for every tensor the config calls for."""

    folder: Path
    config: ModelConfig
    pieces: Mapping[str, Piece]  # by our names
    stamps: Mapping[Path, tuple[int, ...]]  # of the files that were checked, see ``stamp``


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads and checks everything but the data. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = parse_config(read_json(folder / "config.json"))
    pieces = _place(config, _find_tensors(folder))
    files = {piece.info.file for piece in pieces.values()}
    return Checkpoint(folder, config, pieces, {file: stamp(os.stat(file)) for file in files})


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What is another number once a file was replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_tokenizer(folder: str | Path) -> Path:
    """The path of ``tokenizer.json``. Raises CheckpointError when there is none or it is not JSON."""
    path = Path(folder) / "tokenizer.json"
    read_json(path)
    return path


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: is missing in {path.parent}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: must hold a JSON object")
    return value


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of all shards, by the checkpoint's names."""
    if (folder / _INDEX).is_file():
        return _find_sharded(folder)
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(f"{pickles[0]}: only pickled weights; pickle is never read, convert them to safetensors")
    raise CheckpointError(f"{_SINGLE}: is missing in {folder}, and so is {_INDEX}")


def _find_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{_INDEX}: weight_map must be an object that is not empty")
    tensors: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard) or shard.startswith("."):
            raise CheckpointError(f"{_INDEX}: shard {shard!r} must be the name of a safetensors file in the folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{shard}: {_INDEX} names this shard, but it is missing")
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                said = _of_expert(name, "layer {layer} has expert {expert} in two files: ")
                raise CheckpointError(f"{said}tensor {name}: is in {tensors[name].file.name} and in {shard}")
            if name not in weight_map:
                raise CheckpointError(f"{shard}: tensor {name}: {_INDEX} does not name it")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            said = _of_expert(name, "layer {layer} has no expert {expert}: ")
            raise CheckpointError(f"{said}{shard}: tensor {name}: {_INDEX} names it, but it is not in this file")
    return tensors


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint may keep one of our tensors: the tensor's name there, its whole shape, and the first row."""

    name: str
    shape: tuple[int, ...]
    row: int = 0


def _place(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    """Finds every tensor of the config, and refuses any other."""
    row = architecture_of(config)
    used = {name for name in tensors if _UNUSED.fullmatch(name)} | _draft_tensors(config, tensors)
    if config.tie_embeddings:
        used.add("lm_head.weight")
    pieces: dict[str, Piece] = {}
    for name, shape in tensor_shapes(config).items():
        places = _places(row, name, shape, config.num_experts)
        place = _the_only(places, tensors)
        info = tensors[place.name]
        _check(place, info)
        pieces[name] = Piece(info, place.row, shape)
        used.add(place.name)
    for name, info in tensors.items():
        if name not in used:
            said = _of_expert(
                name, f"layer {{layer}} must have experts 0 to {config.num_experts - 1}, not {{expert}}: "
            )
            raise CheckpointError(f"{said}{info.file.name}: tensor {name}: {config.architecture} has no such tensor")
    return pieces


def _draft_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> set[str]:
    first = len(config.layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + config.num_draft_layers))
    return {name for name in tensors if name.startswith(prefixes)}


def _places(row: Architecture, name: str, shape: tuple[int, ...], num_experts: int) -> list[_Place]:
    """The architecture's own name first, then that of transformers' modules, whose experts are one tensor per layer."""
    places = [_Place(candidate, shape) for candidate in dict.fromkeys((row.checkpoint_name(name), name))]
    if match := _EXPERT.fullmatch(name):
        part, expert = match["part"], int(match["expert"])
        stacked = match["prefix"] + ("down_proj" if part == "down" else "gate_up_proj")
        rows = shape[0] if part == "down" else 2 * shape[0]
        first = expert * rows + (shape[0] if part == "up" else 0)
        places.append(_Place(stacked, (num_experts, rows, shape[1]), first))
    return places


def _the_only(places: list[_Place], tensors: Mapping[str, TensorInfo]) -> _Place:
    found = [place for place in places if place.name in tensors]
    if len(found) == 1:
        return found[0]
    name = places[0].name
    if not found:
        said = _of_expert(name, "layer {layer} has no expert {expert}: ")
        raise CheckpointError(f"{said}tensor {name}: is missing from the checkpoint")
    both = " and ".join(f"{place.name} in {tensors[place.name].file.name}" for place in found)
    said = _of_expert(name, "layer {layer} has expert {expert} twice: ")
    raise CheckpointError(f"{said}tensor {name}: is there as {both}")


def _check(place: _Place, info: TensorInfo) -> None:
    where = f"{info.file.name}: tensor {place.name}"
    if info.shape != place.shape:
        said = ""
        if len(place.shape) == 3 and info.shape[1:] == place.shape[1:]:  # all of a layer's experts, but not as many
            layer = place.name.split(".")[2]
            said = f"layer {layer} has {info.shape[0]} experts, and must have {place.shape[0]}: "
        raise CheckpointError(f"{said}{where}: shape must be {place.shape}, not {info.shape}")
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, not {info.dtype}")


def _of_expert(name: str, template: str) -> str:
    """The template with ``{layer}`` and ``{expert}`` filled in for a tensor of an expert; nothing for any other."""
    match = _ANY_EXPERT.fullmatch(name)
    return template.format(**match.groupdict()) if match else ""
