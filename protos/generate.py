"""Writes the Python stubs of every .proto file into ``gen/``.

Run it after changing a .proto file: ``python protos/generate.py``. A test compares its output with what is committed.
The generated modules are rewritten to import each other from ``moestro.protos.gen``, since the proto packages
(``moestro.v1``) are not Python packages of ours.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PROTOS = ("moestro/v1/inference.proto", "moestro/internal/v1/rank.proto")


def generate(target: Path) -> None:
    """Compiles every proto into flat modules under ``target``."""
    from grpc_tools import protoc

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"--{kind}_out={scratch}" for kind in ("python", "grpc_python", "pyi")]
        if protoc.main(["protoc", f"-I{ROOT}", *outputs, *PROTOS]) != 0:
            raise SystemExit("protoc failed")
        for path in sorted(Path(scratch).rglob("*_pb2*")):
            text = re.sub(r"^from moestro[.\w]* import", "from moestro.protos.gen import", path.read_text(), flags=re.M)
            (target / path.name).write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "gen")
