"""What a process that must not pause needs of Python's memory."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """To be called once by whoever owns the process, when everything is built: no later garbage collection walks what
    is there now. A full one through a rank's 300,000 objects (torch, Ray) would stop every sequence for 0.1 s, through
    a gateway's 120,000 every stream and every refusal nearly as long."""
    gc.collect()
    gc.freeze()
