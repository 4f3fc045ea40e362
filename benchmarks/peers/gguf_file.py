"""Writes a checkpoint as bf16 GGUF beside it: ``python -m benchmarks.peers.gguf_file FOLDER``.

The bits of every weight stay as they are; norms and gates are widened to fp32. No tokenizer is written.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from pathlib import Path

import numpy as np
from benchmarks.peers.gguf_names import ARCHITECTURE, FP32, gguf_sources, hyperparameters
from gguf import GGMLQuantizationType, GGUFWriter

NAME = "model.bf16.gguf"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """bf16 tensors as uint16, mapped. The format: an 8-byte length, a JSON header, the data."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name}: expected BF16, got {entry['dtype']}")
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(data, np.uint16, (end - begin) // 2, 8 + length + begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 as uint16 to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path) -> None:
    tensors = {
        name: each for path in sorted(folder.glob("*.safetensors")) for name, each in read_safetensors(path).items()
    }
    target = folder / NAME
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, ARCHITECTURE)
    for key, value in hyperparameters(json.loads((folder / "config.json").read_text())).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{ARCHITECTURE}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, sources in gguf_sources(tensors).items():
        bits = np.stack([tensors[source] for source in sources]) if "_exps" in name else tensors[sources[0]]
        if FP32.search(name):
            writer.add_tensor(name, widen(bits))
        else:
            writer.add_tensor(name, bits.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
