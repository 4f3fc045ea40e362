"""Streams that clients may come back for, on one asyncio loop: remembers them, forgets them in time, finds where a
client was."""

from __future__ import annotations

import asyncio

from moestro.cluster.edge.admitted import Admitted
from moestro.cluster.edge.admitting import not_as_it_was
from moestro.cluster.edge.history import Arrived
from moestro.cluster.edge.journal import Journal
from moestro.cluster.edge.parked import Parked
from moestro.cluster.edge.served import RecoveryLimits
from moestro.protos.errors import FieldViolation, InvalidRequest


class Parking:
    """The asyncio face of ``Parked``."""

    def __init__(self, limits: RecoveryLimits) -> None:
        self._parked = Parked(limits.resume_s, limits.max_parked)
        self._is_open = limits.max_parked > 0
        self._expiry: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, request_id: str) -> bool:
        return self._parked.find(request_id, asyncio.get_running_loop().time()) is not None

    def park(self, journal: Journal) -> None:
        """Remembers what was sent of a stream that is no more."""
        if self._is_open:
            self._parked.put(journal.admitted.request_id, journal.history(), asyncio.get_running_loop().time())
            if self._expiry is None:
                self._expire()

    def discard(self, request_id: str) -> None:
        """The stream goes on."""
        self._parked.discard(request_id)

    def arrived(self, claimed: Arrived, admitted: Admitted, open_journal: Journal | None) -> Arrived:
        """What the client of a stream has of it; ``open_journal`` is that of a stream whose cut nobody has noticed yet.
        Raises InvalidRequest when it cannot be told, or was another request."""
        now_s = asyncio.get_running_loop().time()
        history = self._parked.find(admitted.request_id, now_s) if open_journal is None else open_journal.history()
        if history is not None and history.digest != admitted.digest:
            raise not_as_it_was()
        if claimed.choices:
            return claimed
        if history is not None:
            return history.arrived(claimed.last_number)
        if claimed.last_number is not None:
            described = "must be set: of this request nothing is remembered here"
            raise InvalidRequest([FieldViolation("resume.choices", described)])
        return claimed

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        again_s = self._parked.expire(loop.time())
        self._expiry = None if again_s is None else loop.call_at(again_s, self._expire)
