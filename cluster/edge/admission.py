"""Who may start now, who waits, and who is refused at once.

A request asks with its cost in tokens, prompt and expected output. While there is room for all, everybody starts at
once. When there is not, requests wait here and not in the ranks, so that places are given out fairly: by deficit round
robin over clients, in tokens. The line is bounded in number, in tokens and in time: a request that could not start in
time is refused on arrival, with the time after which it may come again; one whose deadline can no longer be met is
given up without being started. When the line is full, the client that fills it gives way.

Sans-IO: asks, capacities and times in, settled tickets out. Times are seconds of one clock, given by the caller.
"""

from __future__ import annotations

from moestro.cluster.backend import Capacity
from moestro.cluster.edge.estimates import OutputEstimate, Pace
from moestro.cluster.edge.fair_queue import FairQueue, Waiting
from moestro.cluster.edge.tickets import AdmissionCounts, AdmissionLimits, Ask, Refusal, Ticket
from moestro.protos.errors import Overloaded

CAUTION = 1.5  # estimates of waiting are taken for so much longer: who is let in should not be given up later
PATIENCE = 2  # times max_queue_s: who was let in and has waited so long, since ranks were lost meanwhile, is given up
MIN_RETRY_S = 0.1
UNKNOWN_RETRY_S = 1.0  # while nothing has been measured


GIVEN_UP = {
    Refusal.FULL: "the line is full, and this client has the most in it",
    Refusal.WAIT: "it has waited as long as it may",
    Refusal.DEADLINE: "it can no longer end before its deadline",
    Refusal.MEMORY: "memory runs short: nothing may wait",
}


class Admission:
    """See the module. After ``offer``, ``release``, ``expire`` and ``shed`` the caller hears from ``advance`` what has
    come of whom."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.counts = AdmissionCounts()
        self.is_shedding = False  # memory runs short: nobody is let in
        self._queue = FairQueue(limits.quantum)
        self._waiting: dict[Waiting, Ticket] = {}
        self._settled: list[Ticket] = []  # since the last ``advance``
        self._outputs = OutputEstimate()
        self._pace = Pace()
        self._return_s = 0.0  # when the last one that was refused may come again
        self._open_requests = 0
        self._open_sequences = 0
        self._open_tokens = 0

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        return self._queue.cost

    @property
    def num_open(self) -> int:
        """Requests that were started and have not ended."""
        return self._open_requests

    def check(self, client: str, deadline_s: float, capacity: Capacity, now_s: float) -> None:
        """Raises Overloaded when even the smallest request of a client would be refused now, so that a larger one need
        not be looked at."""
        if self.is_shedding or not capacity.sequences:
            raise self.refuse(Refusal.MEMORY, "memory runs short: nothing new is taken", now_s)
        if len(self._queue):
            self._check_wait(client, 1, deadline_s, now_s)
            self._victim(client, 1, capacity, now_s)

    def offer(self, ask: Ask, capacity: Capacity, now_s: float) -> Ticket:
        """Puts a request into the line. Raises Overloaded when it would not start in time, or there is no place."""
        self.check(ask.client, ask.deadline_s, capacity, now_s)
        ticket = self._ticket(ask, now_s)
        if len(self._queue) or not self._fits(ask.choices, ticket.cost, capacity):
            needed_s = self._pace.needed_s(ticket.output_tokens)
            ticket.start_by_s = min(ticket.start_by_s, ask.deadline_s - needed_s)
            self._check_wait(ask.client, ticket.cost, ticket.start_by_s, now_s)
            while (victim := self._victim(ask.client, ticket.cost, capacity, now_s)) is not None:
                self._give_up(self._waiting[victim], Refusal.FULL, now_s)
        self._queue.put(ticket.place)
        self._waiting[ticket.place] = ticket
        return ticket

    def go_on(self, ask: Ask, now_s: float) -> Ticket:
        """For what has waited already and was cut off: started at once, whatever waits."""
        ticket = self._ticket(ask, now_s)
        ticket.started_s = now_s
        self._count_open(ticket, 1)
        return ticket

    def advance(self, capacity: Capacity, now_s: float) -> list[Ticket]:
        """Starts those there is room for. All that were started, or given up with a refusal, since the last call."""
        while (head := self._queue.head()) is not None:
            ticket = self._waiting[head]
            if now_s > ticket.start_by_s:
                self._give_up_late(ticket, now_s)
            elif self._fits(ticket.ask.choices, head.cost, capacity):
                self._start(ticket, now_s)
            else:
                break
        settled, self._settled = self._settled, []
        return settled

    def expire(self, now_s: float) -> None:
        """Gives up those that can no longer start in time. To be called now and then while somebody waits: ``advance``
        looks at the head of the line only."""
        for ticket in [ticket for ticket in self._waiting.values() if now_s > ticket.start_by_s]:
            self._give_up_late(ticket, now_s)

    def shed(self, now_s: float) -> None:
        """Gives up all that wait."""
        for ticket in list(self._waiting.values()):
            self._give_up(ticket, Refusal.MEMORY, now_s)

    def withdraw(self, ticket: Ticket) -> None:
        """The caller of a waiting request has gone. Idempotent."""
        if not ticket.is_over and ticket.started_s is None:
            self._leave(ticket)

    def release(
        self, ticket: Ticket, now_s: float, *, first_s: float | None = None, written: int = 0, finished: bool = False
    ) -> None:
        """A started request is over: its first token came at ``first_s`` (None: never), ``written`` tokens did in all.
        From one that did not come to its own end nothing is learned about what requests write. Idempotent."""
        if ticket.is_over or ticket.started_s is None:
            return
        ticket.is_over = True
        self._count_open(ticket, -1)
        per_choice = written / max(1, ticket.ask.choices)
        if finished:
            self._outputs.learn(ticket.ask.max_tokens, per_choice)
        first_s = None if first_s is None else first_s - ticket.started_s
        self._pace.learn(ticket.cost, now_s - ticket.started_s, first_s, max(0.0, per_choice - 1))

    def refuse(self, reason: Refusal, message: str, now_s: float, earliest_s: float = 0.0) -> Overloaded:
        """The refusal, counted. Those that are refused are told to come again one after the other, at the pace at which
        requests are served and none before ``earliest_s`` from now, so that they do not come back all at once."""
        self.counts.refused[reason] += 1
        each_s = self._pace.seconds_to_free(self._pace.typical_cost, self._open_tokens)
        latest_s = earliest_s + self.limits.max_queue_s
        self._return_s = min(max(self._return_s, now_s + earliest_s) + each_s, now_s + latest_s)
        retry_s = self._return_s - now_s if each_s else UNKNOWN_RETRY_S
        return Overloaded(message, max(MIN_RETRY_S, retry_s))

    def _ticket(self, ask: Ask, now_s: float) -> Ticket:
        output_tokens = self._outputs.expected(ask.max_tokens)
        cost = max(1, ask.choices * (ask.prompt_tokens + output_tokens))
        start_by_s = min(now_s + PATIENCE * self.limits.max_queue_s, ask.deadline_s)
        return Ticket(ask, Waiting(ask.client, cost, ask.priority), output_tokens, now_s, start_by_s)

    # Room.

    def _fits(self, choices: int, cost: int, capacity: Capacity) -> bool:
        """Into what is free; into an empty backend everything does, so that also what is larger than that can run."""
        if not self._open_requests:
            return capacity.sequences > 0
        return self._open_sequences + choices <= capacity.sequences and self._open_tokens + cost <= capacity.tokens

    def _is_full(self, cost: int, capacity: Capacity) -> bool:
        """Whether a request of ``cost`` tokens finds no place in the line. One always does."""
        max_tokens = self.limits.max_queued_tokens or capacity.tokens
        tokens = self._queue.cost + cost
        return len(self._queue) >= self.limits.max_queued or (len(self._queue) > 0 and tokens > max_tokens)

    def _victim(self, client: str, cost: int, capacity: Capacity, now_s: float) -> Waiting | None:
        """Who must give way to a request of this client; None while the line has place. Raises Overloaded when nobody
        has more in it than this client."""
        if not self._is_full(cost, capacity):
            return None
        victim = self._queue.last_of_longest()
        if victim is None or self._queue.cost_of(victim.client) <= self._queue.cost_of(client) + cost:
            waiting = f"{len(self._queue)} requests of {self._queue.cost} tokens wait"
            raise self.refuse(Refusal.FULL, f"{waiting}, as many as may", now_s)
        return victim

    # Time.

    def _check_wait(self, client: str, cost: int, start_by_s: float, now_s: float) -> None:
        """Raises Overloaded when a request would start too late."""
        wait_s = self._wait_s(client, cost)
        longest_s = self.limits.max_queue_s
        allowed_s = max(0.0, min(start_by_s - now_s, longest_s))
        if wait_s > allowed_s:
            reason = Refusal.WAIT if allowed_s == longest_s else Refusal.DEADLINE
            text = f"it would wait for about {wait_s:.1f} s; at most {allowed_s:.1f} s are left to start in"
            raise self.refuse(reason, text, now_s, self._wait_s(client, max(cost, self._pace.typical_cost)) - allowed_s)

    def _wait_s(self, client: str, cost: int) -> float:
        return CAUTION * self._pace.seconds_to_free(self._queue.in_front(client, cost), self._open_tokens)

    def _give_up_late(self, ticket: Ticket, now_s: float) -> None:
        waited_long = now_s - ticket.arrived_s > PATIENCE * self.limits.max_queue_s
        self._give_up(ticket, Refusal.WAIT if waited_long else Refusal.DEADLINE, now_s)

    # From one state to the next.

    def _start(self, ticket: Ticket, now_s: float) -> None:
        self._queue.take()
        del self._waiting[ticket.place]
        ticket.started_s = now_s
        self._count_open(ticket, 1)
        self.counts.queue_s.add(now_s - ticket.arrived_s)
        self._settled.append(ticket)

    def _give_up(self, ticket: Ticket, reason: Refusal, now_s: float) -> None:
        self._leave(ticket)
        ticket.refusal = self.refuse(reason, GIVEN_UP[reason], now_s)
        self._settled.append(ticket)

    def _leave(self, ticket: Ticket) -> None:
        ticket.is_over = True
        self._queue.remove(ticket.place)
        del self._waiting[ticket.place]

    def _count_open(self, ticket: Ticket, sign: int) -> None:
        self._open_requests += sign
        self._open_sequences += sign * ticket.ask.choices
        self._open_tokens += sign * ticket.cost
