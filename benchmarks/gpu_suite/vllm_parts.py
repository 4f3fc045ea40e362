"""A wheel in parts: for a machine that nothing can be downloaded to and that takes files of a limited size.

    python -m benchmarks.gpu_suite.vllm_parts split WHEEL FOLDER     # where there is a network
    python -m benchmarks.gpu_suite.vllm_parts join FOLDER TARGET     # on the machine; then MOESTRO_VLLM=TARGET

What the fused mixture does not need is left out, the rest is compressed with xz. See ``vllm_parts.md``.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = ("_vllm_fa2_C", "_vllm_fa3_C", "vllm-rs", "vllm_flash_attn/", "third_party/flashinfer", ".dist-info/RECORD")
PART_BYTES = 60 << 20


def split(wheel: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Writes part.000 and so on; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with (
        lzma.open(packed, "wb", preset=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
        zipfile.ZipFile(wheel) as files,
    ):
        for info in files.infolist():
            if not any(mark in info.filename for mark in LEFT_OUT) and not info.is_dir():
                entry = tarfile.TarInfo(info.filename)
                entry.size = info.file_size
                archive.addfile(entry, files.open(info))
    data = packed.getbuffer()
    parts = []
    for number, start in enumerate(range(0, len(data), part_bytes)):
        part = folder / f"part.{number:03}"
        part.write_bytes(data[start : start + part_bytes])
        parts.append(part)
    return parts


def join(folder: Path, target: Path) -> None:
    """Unpacks all parts of ``folder`` into ``target``."""
    packed = b"".join(_parts(folder))
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        archive.extractall(target, filter="data")


def _parts(folder: Path) -> Iterator[bytes]:
    parts = sorted(folder.glob("part.*"))
    numbers = [int(part.suffix[1:]) for part in parts]
    if numbers != list(range(len(parts))) or not parts:
        raise FileNotFoundError(f"{folder}: the parts are {numbers}, some are missing")
    return (part.read_bytes() for part in parts)


if __name__ == "__main__":
    what, source, to = sys.argv[1:]
    {"split": split, "join": join}[what](Path(source), Path(to))
