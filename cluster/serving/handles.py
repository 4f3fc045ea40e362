"""The end of Serve's handles in a process that leaves Ray."""

from __future__ import annotations

import time

from ray.serve._private.router import SingletonThreadRouter

STOP_S = 5.0


def stop_handles() -> None:
    """To be called before ``ray.shutdown`` where handles were used. They poll Serve from a thread of their own, and a
    poll that comes after the shutdown ends the whole process with exit code 1. Serve has no call for it. Handles that
    are made later have another thread."""
    loop, SingletonThreadRouter._asyncio_loop = SingletonThreadRouter._asyncio_loop, None
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)
        deadline = time.monotonic() + STOP_S
        while loop.is_running() and time.monotonic() < deadline:
            time.sleep(0.001)
