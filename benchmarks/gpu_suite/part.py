"""One part in a process of its own: ``python -m benchmarks.gpu_suite.part NAME SETTINGS FILE``.

SETTINGS is JSON; every check is appended to FILE as a line of JSON as soon as it is known, so that a process that dies
or hangs loses nothing it has said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.gpu_suite.checks import Settings
from benchmarks.gpu_suite.parts import PARTS


def main(name: str, settings: str, path: str) -> None:
    run = PARTS[name].load()
    with Path(path).open("w") as file:
        for check in run(Settings(**json.loads(settings))):
            file.write(json.dumps(check.record(), allow_nan=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
