"""The header of a safetensors file, believed only after it has been checked.

A file is an unsigned 64-bit length, that many bytes of JSON, and the data. Each tensor names its dtype, shape and a
range of the data; the ranges must tile the data exactly.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from moestro.protos.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the bound of the format's own readers
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    dtype: str  # as the file says: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file. Raises CheckpointError for a file that is cut short or contradicts itself."""
    raw, data_start, data_bytes = _read_json(path)
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in raw.items() if name != "__metadata__"}
    end, last = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset < end:
            raise CheckpointError(f"{path.name}: tensor {name}: its data overlaps that of {last}")
        if info.offset > end:
            raise CheckpointError(
                f"{path.name}: tensor {name}: {info.offset - end} bytes before it belong to no tensor"
            )
        end, last = info.offset + info.num_bytes, name
    if end > data_start + data_bytes:
        missing = end - data_start - data_bytes
        raise CheckpointError(f"{path.name}: tensor {last}: the file is truncated, {missing} bytes are missing")
    if end < data_start + data_bytes:
        raise CheckpointError(f"{path.name}: {data_start + data_bytes - end} bytes at its end belong to no tensor")
    return tensors


def _read_json(path: Path) -> tuple[dict[str, object], int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path.name}: the header's length {length} does not fit a file of {size} bytes "
                    f"(at most {_MAX_HEADER_BYTES}): it is truncated or not safetensors"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: the header is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path.name}: the header is not a JSON object")
    return raw, 8 + length, size - 8 - length


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return entries


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: tensor {name}: {reason}")

    if not isinstance(entry, dict):
        raise refuse("its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise refuse(f"unknown dtype {dtype!r}")
    if shape is None:
        raise refuse(f"shape must be a list of sizes, not {entry.get('shape')!r}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets must be [begin, end], not {entry.get('data_offsets')!r}")
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise refuse(f"{dtype} of shape {shape} takes {num_bytes} bytes, data_offsets {offsets} say otherwise")
    return TensorInfo(path, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _sizes(value: object) -> list[int] | None:
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
        return None
    return value
