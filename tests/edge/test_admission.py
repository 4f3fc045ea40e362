"""The core of admission: bounds, work conservation, fairness, deadlines, honest refusals, and that nothing leaks."""

from __future__ import annotations

import contextlib
import random
import statistics
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.backend import Capacity
from moestro.cluster.edge.admission import Admission
from moestro.cluster.edge.estimates import Histogram, OutputEstimate, Pace
from moestro.cluster.edge.tickets import AdmissionLimits, Ask, Refusal, Ticket
from moestro.protos.errors import Overloaded

WIDE = Capacity(1000, 10**9)


def ask(client: str = "a", prompt: int = 10, output: int = 10, **more: float) -> Ask:
    return Ask(client, prompt, output, **more)  # type: ignore[arg-type]


def started(tickets: list[Ticket]) -> list[Ticket]:
    assert all(ticket.refusal is None for ticket in tickets), tickets
    return tickets


class Server:
    """An admission whose requests all take ``service_s``, with room for so many at a time; its clock jumps from one
    event to the next."""

    def __init__(self, limits: AdmissionLimits, seats: int, service_s: float) -> None:
        self.admission = Admission(limits)
        self.capacity = Capacity(seats, 10**9)
        self.service_s = service_s
        self.now_s = 0.0
        self.running: list[Ticket] = []
        self.started: list[Ticket] = []
        self.late: list[Ticket] = []  # given up after they were let in

    def offer(self, ask: Ask) -> Ticket | Overloaded:
        try:
            ticket = self.admission.offer(ask, self.capacity, self.now_s)
        except Overloaded as refusal:
            return refusal
        self._take(self.admission.advance(self.capacity, self.now_s))
        return ticket

    def run(self, until_s: float) -> None:
        while self.running and self._next_end_s() <= until_s:
            self.now_s = self._next_end_s()
            ended = self.running.pop(0)
            written = ended.ask.max_tokens * ended.ask.choices
            first_s = (ended.started_s or 0.0) + self.service_s / 10
            self.admission.release(ended, self.now_s, first_s=first_s, written=written, finished=True)
            self.admission.expire(self.now_s)
            self._take(self.admission.advance(self.capacity, self.now_s))
        self.now_s = until_s

    def _next_end_s(self) -> float:
        return (self.running[0].started_s or 0.0) + self.service_s

    def _take(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.refusal is None:
                self.running.append(ticket)
                self.started.append(ticket)
            else:
                self.late.append(ticket)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_bounds_hold_nothing_leaks_and_no_room_is_left_unused(seed: int) -> None:
    draw = random.Random(seed)
    limits = AdmissionLimits(
        max_queued=draw.randrange(6), max_queued_tokens=draw.choice([0, 500]), max_queue_s=5.0, quantum=50
    )
    it = Admission(limits)
    capacity = Capacity(4, 800)
    now_s = 0.0
    waiting: set[Ticket] = set()
    running: set[Ticket] = set()

    def advance() -> None:
        for ticket in it.advance(capacity, now_s):
            waiting.remove(ticket)  # each is told of once
            if ticket.refusal is None:
                running.add(ticket)
                assert now_s <= ticket.start_by_s
            else:
                assert ticket.is_over
        assert it.num_queued == len(waiting) <= max(limits.max_queued, 1)
        assert it.queued_tokens == sum(ticket.cost for ticket in waiting)
        if len(waiting) > 1:
            assert it.queued_tokens <= (limits.max_queued_tokens or most.tokens)
        assert it.num_open == len(running)
        if len(running) > 1:
            assert sum(ticket.ask.choices for ticket in running) <= most.sequences
            assert sum(ticket.cost for ticket in running) <= most.tokens
        if waiting and capacity.sequences:
            assert running  # an empty backend takes anybody
            head = it._queue.head()
            assert head is not None
            assert not it._fits(it._waiting[head].ask.choices, head.cost, capacity)

    most = capacity  # of this run
    for _ in range(150):
        match draw.randrange(6):
            case 0 | 1:
                wish = Ask(
                    f"c{draw.randrange(3)}",
                    prompt_tokens=draw.randrange(1, 200),
                    max_tokens=draw.randrange(1, 200),
                    choices=draw.choice([1, 1, 3]),
                    priority=draw.randrange(2),
                    deadline_s=draw.choice([inf, now_s + draw.random() * 8]),
                )
                with contextlib.suppress(Overloaded):
                    waiting.add(it.offer(wish, capacity, now_s))
                advance()
            case 2:
                now_s += draw.random()
                it.expire(now_s)
                advance()
                assert all(now_s <= ticket.start_by_s for ticket in waiting)
            case 3 if running:
                ticket = running.pop() if draw.random() < 0.2 else min(running, key=lambda t: (t.started_s, t.cost))
                running.discard(ticket)
                for _ in range(2):  # idempotent
                    it.release(ticket, now_s, first_s=ticket.started_s, written=5, finished=draw.random() < 0.5)
                advance()
            case 4 if waiting:
                ticket = min(waiting, key=lambda t: (t.arrived_s, t.cost))
                waiting.discard(ticket)
                for _ in range(2):
                    it.withdraw(ticket)
                advance()
            case 5 if not running:
                capacity = Capacity(draw.randrange(6), draw.randrange(100, 1000))
                most = capacity
                advance()
    if draw.random() < 0.5:
        it.shed(now_s)
        advance()
        assert not waiting
    capacity = most = WIDE
    advance()
    while waiting or running:
        for ticket in tuple(running):
            running.discard(ticket)
            it.release(ticket, now_s)
        advance()
    assert (it.num_open, it.num_queued, it.queued_tokens) == (0, 0, 0)
    assert (it._open_sequences, it._open_tokens, it._waiting) == (0, 0, {})


def test_while_there_is_room_everybody_starts_at_once() -> None:
    it = Admission(AdmissionLimits(max_queued=0))
    for number in range(1000):
        ticket = it.offer(ask(f"c{number % 7}"), WIDE, float(number))
        assert started(it.advance(WIDE, float(number))) == [ticket]
    assert it.counts.queue_s.cumulative()[0] == 1000
    with pytest.raises(Overloaded, match="0 requests of 0 tokens wait, as many as may"):
        it.offer(ask(), WIDE, 0.0)
    assert it.counts.refused == {Refusal.FULL: 1}


def test_what_is_larger_than_all_runs_alone() -> None:
    it = Admission(AdmissionLimits())
    small = Capacity(2, 100)
    huge = it.offer(ask(prompt=500, choices=9), small, 0.0)
    assert started(it.advance(small, 0.0)) == [huge]
    other = it.offer(ask(), small, 0.0)
    assert it.advance(small, 0.0) == []
    it.release(huge, 1.0)
    assert started(it.advance(small, 1.0)) == [other]


def test_a_flood_does_not_starve_a_polite_client() -> None:
    """One asks for everything at once, the other for one thing after the other: in tokens they get the same."""
    it = Server(AdmissionLimits(max_queued=500, max_queue_s=200.0, quantum=40), seats=4, service_s=1.0)
    for _ in range(400):
        it.offer(ask("flood"))
    polite, waits_s = 0, []
    for second in range(1, 40):
        own = it.offer(ask("polite"))
        assert isinstance(own, Ticket)
        it.run(float(second))
        if own.started_s is not None:
            polite += 1
            waits_s.append(own.started_s - own.arrived_s)
    assert polite == 39
    assert max(waits_s) <= 1.0  # the next that ends makes place
    assert len(it.started) - polite >= 3 * 38  # and the flood has all the rest


def test_in_a_full_line_the_flood_gives_way() -> None:
    it = Server(AdmissionLimits(max_queued=20), seats=2, service_s=1.0)
    flood = [it.offer(ask("flood")) for _ in range(40)]
    assert sum(isinstance(each, Overloaded) for each in flood) == 18
    polite = [it.offer(ask("polite")) for _ in range(10)]
    assert all(isinstance(each, Ticket) for each in polite)
    assert [each.ask.client for each in it.late] == ["flood"] * 10
    assert {str(each.refusal) for each in it.late} == {"the line is full, and this client has the most in it"}
    assert isinstance(it.offer(ask("polite")), Overloaded)  # they have the same now
    assert it.admission.num_queued == 20


def test_within_a_client_the_more_urgent_go_first() -> None:
    it = Admission(AdmissionLimits())
    one = Capacity(1, 1000)
    running = it.offer(ask(), one, 0.0)
    order = started(it.advance(one, 0.0))
    tickets = [it.offer(ask(priority=priority), one, 0.0) for priority in (0, 1, -1, 0)]
    it.release(running, 0.0)
    for _ in range(4):
        order += started(it.advance(one, 0.0))
        it.release(order[-1], 0.0)
    assert order == [running, tickets[2], tickets[0], tickets[3], tickets[1]]


@pytest.mark.parametrize("overload", [1.5, 3.0, 10.0])
def test_those_let_in_start_in_time_and_the_others_are_refused_on_arrival(overload: float) -> None:
    """Arrivals above capacity: the line stays as long as may be waited, and hardly anybody is given up in it."""
    it = Server(AdmissionLimits(max_queued=10**6, max_queue_s=5.0, quantum=20), seats=10, service_s=1.0)
    draw = random.Random(7)
    arrivals = [0.0]
    while arrivals[-1] < 60.0:
        arrivals.append(arrivals[-1] + draw.expovariate(10 * overload))
    refused = []
    for time_s in arrivals:
        it.run(time_s)
        answer = it.offer(ask(f"c{draw.randrange(5)}"))
        if isinstance(answer, Overloaded) and time_s > 10.0:
            refused.append(answer)
    # Those that came before anything had ended could not be told how long they would wait.
    waits_s = [(t.started_s or 0.0) - t.arrived_s for t in it.started if t.arrived_s > 2.0]
    assert statistics.quantiles(waits_s, n=100)[-1] <= 5.0
    assert [each for each in it.late if each.arrived_s > 2.0] == []
    assert len(it.started) >= 0.97 * 10 * 60.0  # it was never idle
    if overload >= 3:
        assert len(refused) > 0.5 * len([each for each in arrivals if each > 10.0])


def test_a_deadline_that_cannot_be_met_is_refused_and_one_that_can_is_kept() -> None:
    it = Server(AdmissionLimits(max_queued=10**6, max_queue_s=1000.0), seats=1, service_s=1.0)
    it.offer(ask())
    it.run(1.0)  # so it knows: one second each
    for _ in range(4):
        it.offer(ask())
    assert isinstance(it.offer(ask(deadline_s=it.now_s + 4.5)), Overloaded)  # in front: 4 s; its own: 1 s
    assert it.admission.counts.refused == {Refusal.DEADLINE: 1}
    kept = it.offer(ask(deadline_s=it.now_s + 8.0))
    it.run(10.0)
    assert isinstance(kept, Ticket)
    assert kept.started_s == 5.0
    assert it.late == []


def test_one_that_can_no_longer_end_in_time_is_given_up_without_being_started() -> None:
    it = Server(AdmissionLimits(), seats=1, service_s=1.0)
    it.offer(ask())
    it.run(1.0)
    it.service_s = 100.0  # from now on everything is slower than anybody could know
    it.offer(ask())
    doomed = it.offer(ask(deadline_s=4.0))
    assert isinstance(doomed, Ticket)
    it.admission.expire(3.05)
    outcomes = it.admission.advance(it.capacity, 3.05)
    assert [(each, str(each.refusal)) for each in outcomes] == [(doomed, "it can no longer end before its deadline")]
    assert doomed.started_s is None


def test_a_deadline_in_an_idle_server_needs_only_to_lie_ahead() -> None:
    it = Server(AdmissionLimits(), seats=2, service_s=10.0)
    it.offer(ask())
    it.run(20.0)
    assert isinstance(it.offer(ask(deadline_s=20.5)), Ticket)
    assert len(it.started) == 2


@settings(deadline=None)
@given(extra=st.integers(1, 30), seats=st.integers(1, 8), max_queue_s=st.floats(0.5, 5.0))
def test_retry_info_is_honest(extra: int, seats: int, max_queue_s: float) -> None:
    """Whoever comes again when told to, and finds nobody else who came meanwhile, is let in (all requests here end
    together, once a second, which no mean rate foretells: hence the second). Those refused together are not told to
    come back together."""
    it = Server(AdmissionLimits(max_queued=10**6, max_queue_s=max_queue_s), seats, service_s=1.0)
    for _ in range(seats):
        it.offer(ask())
    it.run(1.0)
    refusals = []
    for _ in range(1000):
        answer = it.offer(ask())
        if isinstance(answer, Overloaded):
            refusals.append(answer)
        if len(refusals) == extra:
            break
    retries_s = [refusal.retry_after_s for refusal in refusals]
    assert retries_s == sorted(retries_s)
    assert len(set(retries_s)) > 1 or extra == 1 or retries_s[0] >= max_queue_s
    it.run(1.0 + retries_s[0] + it.service_s)
    assert isinstance(it.offer(ask()), Ticket)


def test_memory_that_runs_short_stops_the_new_and_then_the_waiting() -> None:
    it = Admission(AdmissionLimits())
    one = Capacity(1, 1000)
    running = it.offer(ask(), one, 0.0)
    waiting = it.offer(ask(), one, 0.0)
    assert started(it.advance(one, 0.0)) == [running]
    it.is_shedding = True
    with pytest.raises(Overloaded, match="memory runs short"):
        it.offer(ask(), one, 0.0)
    it.shed(0.0)
    assert [(each, str(each.refusal)) for each in it.advance(one, 0.0)] == [
        (waiting, "memory runs short: nothing may wait")
    ]
    assert it.num_open == 1
    it.is_shedding = False
    with pytest.raises(Overloaded, match="memory runs short"):
        it.offer(ask(), Capacity(0, 0), 0.0)  # every rank says so
    assert it.counts.refused[Refusal.MEMORY] == 3


def test_a_look_refuses_whom_an_offer_would() -> None:
    it = Server(AdmissionLimits(max_queued=3, max_queue_s=10.0), seats=1, service_s=1.0)
    it.offer(ask("flood"))
    it.run(1.0)
    for _ in range(4):
        it.offer(ask("flood"))
    it.admission.check("polite", inf, it.capacity, it.now_s)
    with pytest.raises(Overloaded, match="3 requests of 60 tokens wait"):
        it.admission.check("flood", inf, it.capacity, it.now_s)
    with pytest.raises(Overloaded, match="are left to start in"):
        it.admission.check("polite", it.now_s, it.capacity, it.now_s)


def test_what_requests_write_is_learned_from_those_with_an_allowance_of_that_size() -> None:
    estimate = OutputEstimate()
    assert (estimate.expected(4000), estimate.expected(400)) == (512, 400)
    for written in (100, 300):
        estimate.learn(4000, written)
    assert estimate.expected(4000) == pytest.approx(200, rel=0.01)
    assert estimate.expected(2048) == pytest.approx(102, abs=2)
    assert estimate.expected(16) == 16
    for _ in range(500):
        estimate.learn(4000, 4000)
    assert estimate.expected(4000) >= 3990


def test_an_admission_learns_that_requests_write_less_than_they_may() -> None:
    """So that a line of requests which may write everything is not taken for a line that does."""
    it = Admission(AdmissionLimits())
    tight = Capacity(100, 1000)
    for _ in range(3):
        ticket = it.offer(ask(prompt=10, output=900), tight, 0.0)
        it.advance(tight, 0.0)
        it.release(ticket, 1.0, first_s=0.1, written=40, finished=True)
    started_then = []
    for _ in range(25):
        it.offer(ask(prompt=10, output=900), tight, 1.0)
        started_then += started(it.advance(tight, 1.0))
    assert len(started_then) == 20


def test_pace_is_that_of_little_and_of_the_first_token() -> None:
    pace = Pace()
    assert (pace.needed_s(100), pace.seconds_to_free(100, 1000)) == (0.0, 0.0)
    pace.learn(cost=50, service_s=2.0, first_s=0.5, tokens_after_first=30)
    assert pace.needed_s(11) == pytest.approx(0.5 + 10 * 0.05)
    assert pace.seconds_to_free(100, 400) == pytest.approx(0.5)  # 400 in 2 s
    pace.learn(cost=50, service_s=2.0, first_s=None, tokens_after_first=0)  # gone before its first token
    assert pace.needed_s(1) == pytest.approx(0.5)


def test_a_histogram_counts_as_prometheus_does() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 3.0):
        histogram.add(value)
    assert histogram.cumulative() == [2, 3, 4]
    assert histogram.total == pytest.approx(3.65)
