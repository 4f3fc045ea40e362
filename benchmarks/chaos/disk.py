"""A small disk of its own, which can be filled without hurting anybody else. Needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIZE = 256 * 2**20
CHUNK = 2**20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mounts one while the block runs; None where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Every byte of the disk is taken while the block runs."""
    ballast = folder / "ballast"
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:  # ENOSPC is what it is for
            while True:
                file.write(bytes(CHUNK))
        yield
    finally:
        ballast.unlink(missing_ok=True)
