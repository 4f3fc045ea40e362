"""The asyncio face of admission: a permit is awaited before a request is started, and given back when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from moestro.cluster.backend import Capacity
from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.tickets import AdmissionCounts, Ask, Refusal, Ticket
from moestro.cluster.memory import Pressure
from moestro.protos.errors import Overloaded, Unavailable

POLL_S = 0.02  # while somebody waits: ranks come and go, and other gateways' requests end, without a word to us

_NOTHING = Capacity(0, 0)


class Permit:
    """The right to run one request."""

    def __init__(self, permits: Permits, ticket: Ticket) -> None:
        self._permits = permits
        self._ticket = ticket

    @property
    def queued_s(self) -> float:
        """How long it was waited for."""
        return (self._ticket.started_s or self._ticket.arrived_s) - self._ticket.arrived_s

    def give_back(self, *, first_s: float | None = None, written: int = 0, finished: bool = False) -> None:
        """The request is over; see ``Admission.release``. Idempotent."""
        self._permits.release(self._ticket, first_s, written, finished)


class Permits:
    """Admission to one backend, by the loop's clock. All methods on one asyncio loop."""

    def __init__(self, admission: Admission, capacity: Callable[[], Capacity]) -> None:
        self._admission = admission
        self._capacity = capacity
        self._futures: dict[Ticket, asyncio.Future[None]] = {}  # of those that wait
        self._poll: asyncio.TimerHandle | None = None

    @property
    def num_queued(self) -> int:
        return self._admission.num_queued

    @property
    def queued_tokens(self) -> int:
        return self._admission.queued_tokens

    @property
    def num_open(self) -> int:
        """Permits that are out."""
        return self._admission.num_open

    @property
    def counts(self) -> AdmissionCounts:
        return self._admission.counts

    def check(self, client: str, deadline_s: float) -> None:
        """Raises Overloaded when there is no hope for any request of this client, Unavailable without any rank."""
        self._admission.check(client, deadline_s, self._capacity(), _now())

    async def take(self, ask: Ask) -> Permit:
        """Waits for its turn. Raises Overloaded, at once when it would not come in time; Unavailable without any rank.
        ``ask.deadline_s`` is of the loop's clock."""
        now_s = _now()
        capacity = self._capacity()
        ticket = self._admission.offer(ask, capacity, now_s)
        self._advance(capacity, now_s)
        if ticket.started_s is None and ticket.refusal is None:
            future = asyncio.get_running_loop().create_future()
            self._futures[ticket] = future
            self._poll_later()
            try:
                await future
            except BaseException:
                self._futures.pop(ticket, None)
                self._admission.withdraw(ticket)
                self.release(ticket)  # the permit may have come together with the end of its caller
                raise
        if ticket.refusal is not None:
            raise ticket.refusal
        return Permit(self, ticket)

    def go_on(self, ask: Ask) -> Permit:
        """For a request that had a permit and was cut off."""
        return Permit(self, self._admission.go_on(ask, _now()))

    def release(self, ticket: Ticket, first_s: float | None = None, written: int = 0, finished: bool = False) -> None:
        now_s = _now()
        self._admission.release(ticket, now_s, first_s=first_s, written=written, finished=finished)
        if self._futures:
            self._advance(self._capacity_now(), now_s)

    def refuse(self, reason: Refusal, message: str) -> Overloaded:
        """A refusal for a reason that admission does not know of, counted with the others."""
        return self._admission.refuse(reason, message, _now())

    def set_pressure(self, pressure: Pressure) -> None:
        """How short the memory of this process is."""
        self._admission.is_shedding = pressure >= Pressure.NEW
        if pressure >= Pressure.WAITING:
            now_s = _now()
            self._admission.shed(now_s)
            self._advance(self._capacity_now(), now_s)

    def _advance(self, capacity: Capacity, now_s: float) -> None:
        for ticket in self._admission.advance(capacity, now_s):
            future = self._futures.pop(ticket, None)
            if future is not None and not future.done():
                future.set_result(None)

    def _poll_later(self) -> None:
        if self._poll is None and self._futures:
            self._poll = asyncio.get_running_loop().call_later(POLL_S, self._on_poll)

    def _on_poll(self) -> None:
        self._poll = None
        now_s = _now()
        self._admission.expire(now_s)
        self._advance(self._capacity_now(), now_s)
        self._poll_later()

    def _capacity_now(self) -> Capacity:
        """Nothing while there is no rank: who waits goes on waiting."""
        try:
            return self._capacity()
        except Unavailable:
            return _NOTHING


def _now() -> float:
    return asyncio.get_running_loop().time()
