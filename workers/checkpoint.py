"""A Hugging Face checkpoint folder, checked from its headers alone: nothing is loaded here.

What cannot be served is refused with a CheckpointError that names file, tensor and reason. Nothing from a checkpoint is
ever run, and pickled weights are never opened.
"""

from __future__ import annotations

import json
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


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads and checks everything but the data. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = parse_config(read_json(folder / "config.json"))
    return Checkpoint(folder, config, _place(config, _find_tensors(folder)))


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
                raise CheckpointError(f"{shard}: tensor {name}: it is in {tensors[name].file.name} as well")
            if name not in weight_map:
                raise CheckpointError(f"{shard}: tensor {name}: {_INDEX} does not name it")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{shard}: tensor {name}: {_INDEX} names it, but it is not in this file")
    return tensors


def _place(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    """Finds every tensor of the config, and refuses any other."""
    row = architecture_of(config)
    used = {name for name in tensors if _UNUSED.fullmatch(name)}
    if config.tie_embeddings:
        used.add("lm_head.weight")
    pieces: dict[str, Piece] = {}
    for name, shape in tensor_shapes(config).items():
        found, expected, first = _find(row, name, shape, tensors, config.num_experts)
        info = tensors[found]
        if info.shape != expected:
            raise CheckpointError(f"{info.file.name}: tensor {found}: shape must be {expected}, not {info.shape}")
        if info.dtype not in _DTYPES:
            raise CheckpointError(
                f"{info.file.name}: tensor {found}: dtype must be one of {', '.join(_DTYPES)}, not {info.dtype}"
            )
        pieces[name] = Piece(info, first, shape)
        used.add(found)
    for name, info in tensors.items():
        if name not in used:
            raise CheckpointError(f"{info.file.name}: tensor {name}: {config.architecture} has no such tensor")
    return pieces


def _find(
    row: Architecture, name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], num_experts: int
) -> tuple[str, tuple[int, ...], int]:
    """The checkpoint's name, its whole shape there, and the first row: the architecture's own name, or that of
    transformers' modules, whose experts are one tensor per layer."""
    theirs = row.checkpoint_name(name)
    for candidate in (theirs, name):
        if candidate in tensors:
            return candidate, shape, 0
    if match := _EXPERT.fullmatch(name):
        part, expert = match["part"], int(match["expert"])
        stacked = match["prefix"] + ("down_proj" if part == "down" else "gate_up_proj")
        if stacked in tensors:
            rows = shape[0] if part == "down" else 2 * shape[0]
            return stacked, (num_experts, rows, shape[1]), expert * rows + (shape[0] if part == "up" else 0)
    raise CheckpointError(f"tensor {theirs}: is missing from the checkpoint")
