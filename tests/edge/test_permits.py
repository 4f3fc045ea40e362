"""The asyncio face of admission: nobody waits for what has been decided, and nobody's end is missed."""

from __future__ import annotations

import asyncio

import pytest
from tests.edge.serving import run

from moestro.cluster.backend import Capacity
from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.permits import POLL_S, Permits
from moestro.cluster.edge.tickets import AdmissionLimits, Ask
from moestro.protos.errors import Overloaded, Unavailable


class Room:
    """A capacity that tests change; None: no rank."""

    def __init__(self, seats: int | None) -> None:
        self.seats = seats

    def __call__(self) -> Capacity:
        if self.seats is None:
            raise Unavailable("no rank is serving now")
        return Capacity(self.seats, 10**6)


def test_one_that_is_given_up_as_it_comes_is_told_so() -> None:
    async def test() -> None:
        permits = Permits(Admission(AdmissionLimits()), Room(1))
        await permits.take(Ask("a", 1, 1))
        past_s = asyncio.get_running_loop().time() - 1
        with pytest.raises(Overloaded, match="before its deadline"):
            async with asyncio.timeout(5):
                await permits.take(Ask("a", 1, 1, deadline_s=past_s))
        assert permits.num_queued == 0

    run(test())


def test_room_that_appears_without_a_word_is_seen() -> None:
    async def test() -> None:
        room = Room(1)
        permits = Permits(Admission(AdmissionLimits()), room)
        first = await permits.take(Ask("a", 1, 1))
        second = asyncio.ensure_future(permits.take(Ask("a", 1, 1)))
        await asyncio.sleep(3 * POLL_S)
        assert not second.done()
        room.seats = 2
        (await asyncio.wait_for(second, 5)).give_back()
        first.give_back()
        assert permits.num_open == 0

    run(test())


def test_who_waits_goes_on_waiting_while_there_is_no_rank_and_who_comes_is_told() -> None:
    async def test() -> None:
        room = Room(1)
        permits = Permits(Admission(AdmissionLimits()), room)
        first = await permits.take(Ask("a", 1, 1))
        second = asyncio.ensure_future(permits.take(Ask("a", 1, 1)))
        await asyncio.sleep(0)
        room.seats = None
        first.give_back()
        await asyncio.sleep(3 * POLL_S)
        assert not second.done()
        with pytest.raises(Unavailable):
            await permits.take(Ask("a", 1, 1))
        room.seats = 1
        assert (await asyncio.wait_for(second, 5)).queued_s >= 3 * POLL_S

    run(test())


def test_a_permit_that_comes_with_the_end_of_its_caller_is_given_back() -> None:
    async def test() -> None:
        permits = Permits(Admission(AdmissionLimits()), Room(1))
        first = await permits.take(Ask("a", 1, 1))
        second = asyncio.ensure_future(permits.take(Ask("a", 1, 1)))
        await asyncio.sleep(0)
        first.give_back()  # the second has its permit now, and has not run since
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (permits.num_open, permits.num_queued) == (0, 0)

    run(test())
