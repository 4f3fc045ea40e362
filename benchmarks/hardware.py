"""The hardware record for the JSON of every benchmark here: ``from benchmarks.hardware import hardware_record``.

Run alone, it prints the record. Needs no torch; the code lives in the package because ``moestro bench`` needs it too.
"""

from __future__ import annotations

import json

from moestro.cluster.bench.hardware import Record, hardware_record

__all__ = ["Record", "hardware_record"]

if __name__ == "__main__":
    print(json.dumps(hardware_record(), indent=2))
