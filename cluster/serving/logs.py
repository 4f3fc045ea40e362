"""Where our log lines go inside Ray's workers."""

from __future__ import annotations

import logging
import sys


def log_to_ray(level: int = logging.INFO) -> None:
    """Sends the lines of ``moestro.*`` to standard error, which Ray keeps in the session's ``worker-*.err``.

    For a process that Ray has started; calling it again changes nothing.
    """
    ours = logging.getLogger("moestro")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(level)
        ours.propagate = False
