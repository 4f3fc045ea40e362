"""A process that has used Serve's handles can leave Ray."""

from __future__ import annotations

import asyncio
import threading

from ray.serve._private.router import SingletonThreadRouter

from moestro.cluster.serving.handles import stop_handles


def test_the_thread_that_polls_serve_has_ended() -> None:
    """Found by the twentieth rolling update: `moestro scale` had done its work and ended with 1 all the same."""
    assert "_asyncio_loop" in vars(SingletonThreadRouter)  # as Serve calls it
    stop_handles()
    loop = SingletonThreadRouter._asyncio_loop = asyncio.new_event_loop()
    polls = threading.Thread(target=loop.run_forever, daemon=True)
    polls.start()
    stop_handles()
    polls.join(5.0)
    assert not polls.is_alive()
    assert SingletonThreadRouter._asyncio_loop is None
    loop.close()
