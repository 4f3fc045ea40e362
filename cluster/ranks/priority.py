"""Loading beside ranks that serve, without taking their processors from them."""

from __future__ import annotations

import os
import sys
import threading

NICER = 5  # a third of the processor time that a neighbour of equal rank before gets; all of what nobody else wants


def gentle() -> None:
    """Puts the calling thread, and those that it starts, a little behind everything else. There is no way back without
    privileges: for a thread that ends when its work is done."""
    if sys.platform == "linux":  # elsewhere a priority is a process's
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
