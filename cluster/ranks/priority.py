"""Loading beside ranks that serve, with what processor time they leave."""

from __future__ import annotations

import os
import sys


def gentle() -> None:
    """Puts the calling thread, and those that it starts, behind everything else. There is no way back without
    privileges: for a thread that ends when its work is done."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
