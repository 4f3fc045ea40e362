"""Clients that leave as they like leave nothing behind (``make test``'s share of ``benchmarks/cancels.py``)."""

from __future__ import annotations

import asyncio

from benchmarks.cancels import leave
from tests.edge.fakes import served


def test_two_hundred_leave_nothing() -> None:
    result = asyncio.run(leave(200, 1, served(), lambda done: None))
    assert result["leaked"] == {}, result
    assert result["after"]["kv_blocks"] == result["after"]["open_requests"] == result["after"]["queued"] == 0
    assert result["outcomes"]["to the end"] > 5
    assert result["outcomes"]["cancelled"] > 5
