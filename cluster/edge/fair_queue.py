"""A queue that is fair to its clients: deficit round robin over what they wait for.

M. Shreedhar and G. Varghese, "Efficient Fair Queuing using Deficit Round Robin" (IEEE/ACM ToN 1996): each client has a
line of its own; in its turn it may take out what a quantum more of credit pays for, and what it cannot spend it keeps
for its next turn. Between two clients that always wait, what they got differs by less than two of the largest costs
and a quantum, however much either of them asks for. The cost of a take is constant where costs are below the quantum.

Within one client's line the order is that of priority, then arrival. Sans-IO, no clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from operator import attrgetter


@dataclass(slots=True, eq=False)
class Waiting:
    """One place in the queue. ``cost`` is at least 1."""

    client: str
    cost: int
    priority: int = 0  # smaller first, within its client's line only
    number: int = field(default=0, init=False)  # of its arrival; given by the queue

    @property
    def key(self) -> tuple[int, int]:
        return self.priority, self.number


_KEY = attrgetter("key")


@dataclass(slots=True)
class _Line:
    """One client's. It exists only while something waits in it: credit is not saved up while away."""

    deficit: int
    cost: int = 0  # of all that waits
    waiting: list[Waiting] = field(default_factory=list)  # in the order of service


class FairQueue:
    """See the module. ``quantum`` is what a client may take out in its turn, in the unit of costs."""

    def __init__(self, quantum: int) -> None:
        if quantum < 1:
            raise ValueError(f"quantum must be at least 1, not {quantum}")
        self._quantum = quantum
        self._lines: OrderedDict[str, _Line] = OrderedDict()  # whose turn it is comes first
        self._num_waiting = 0
        self._num_arrivals = 0
        self._cost = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def cost(self) -> int:
        """Of all that waits."""
        return self._cost

    @property
    def num_clients(self) -> int:
        """Of whom something waits."""
        return len(self._lines)

    def cost_of(self, client: str) -> int:
        """Of what waits of one client."""
        line = self._lines.get(client)
        return 0 if line is None else line.cost

    def put(self, waiting: Waiting) -> None:
        """Last of its priority in its client's line; a client that had nothing here comes after all the others."""
        line = self._lines.get(waiting.client)
        if line is None:
            line = self._lines[waiting.client] = _Line(self._quantum)
        waiting.number = self._num_arrivals
        self._num_arrivals += 1
        insort(line.waiting, waiting, key=_KEY)
        self._count(line, waiting, 1)

    def head(self) -> Waiting | None:
        """Who is to be taken next; moves the turn on to a client that can pay. It stays the head until it is taken or
        removed, or something more urgent comes into the same line."""
        while self._lines:
            client, line = next(iter(self._lines.items()))
            if line.waiting[0].cost <= line.deficit:
                return line.waiting[0]
            line.deficit += self._quantum  # for its next turn
            self._lines.move_to_end(client)
        return None

    def take(self) -> Waiting:
        """Takes the head out and charges its client. Raises IndexError when nothing waits."""
        head = self.head()
        if head is None:
            raise IndexError("nothing waits")
        self._lines[head.client].deficit -= head.cost
        self.remove(head)
        return head

    def remove(self, waiting: Waiting) -> None:
        """Takes one out at no charge. Raises KeyError when it is not here."""
        line = self._lines[waiting.client]
        index = bisect_left(line.waiting, waiting.key, key=_KEY)
        if index == len(line.waiting) or line.waiting[index] is not waiting:
            raise KeyError(waiting.number)
        del line.waiting[index]
        self._count(line, waiting, -1)
        if not line.waiting:
            del self._lines[waiting.client]

    def in_front(self, client: str, cost: int) -> int:
        """About what is taken out until ``cost`` more of this client has been, itself included: its own line, and of
        each other client's as much; but of all of them together no more than twice what waits there now, since those
        with more to ask go on asking."""
        own = self.cost_of(client) + cost
        others = self._cost - self.cost_of(client)
        num_others = len(self._lines) - (client in self._lines)
        return own + min(2 * others, num_others * own)

    def last_of_longest(self) -> Waiting | None:
        """The one who gives way when the queue is full: the last in the costliest line (P. McKenney, "Stochastic
        Fairness Queueing", 1990), so that whoever fills the queue is the one who loses places."""
        if not self._lines:
            return None
        return max(self._lines.values(), key=lambda line: line.cost).waiting[-1]

    def _count(self, line: _Line, waiting: Waiting, sign: int) -> None:
        line.cost += sign * waiting.cost
        self._cost += sign * waiting.cost
        self._num_waiting += sign
