"""Deficit round robin: what Shreedhar and Varghese promise of it, and that the queue keeps its books."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cluster.edge.fair_queue import FairQueue, Waiting

COSTS = st.lists(st.integers(1, 3000), min_size=1, max_size=8)


@settings(deadline=None)
@given(quantum=st.integers(20, 1000), costs=st.lists(COSTS, min_size=2, max_size=6), takes=st.integers(1, 300))
def test_clients_that_always_wait_get_the_same_but_for_a_bound(
    quantum: int, costs: list[list[int]], takes: int
) -> None:
    """Theorem 1 of the paper: over any interval the difference is below two of the largest costs and a quantum."""
    queue = FairQueue(quantum)
    largest = max(max(each) for each in costs)
    put = [0] * len(costs)

    def refill(client: int) -> None:
        queue.put(Waiting(str(client), costs[client][put[client] % len(costs[client])]))
        put[client] += 1

    for client in range(len(costs)):
        refill(client)
        refill(client)
    served = [[0] for _ in costs]  # after each take
    for _ in range(takes):
        taken = queue.take()
        refill(int(taken.client))
        for client, each in enumerate(served):
            each.append(each[-1] + taken.cost * (client == int(taken.client)))
    for a, b in [(a, b) for a in served for b in served if a is not b]:
        differences = [x - y for x, y in zip(a, b, strict=True)]
        assert max(differences) - min(differences) <= 2 * (2 * largest + quantum)
        assert max(map(abs, differences)) <= 2 * largest + quantum


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), quantum=st.integers(20, 600))
def test_books_are_kept_through_any_puts_takes_and_removals(seed: int, quantum: int) -> None:
    draw = random.Random(seed)
    queue = FairQueue(quantum)
    inside: list[Waiting] = []
    for _ in range(draw.randrange(120)):
        match draw.randrange(3):
            case 0:
                inside.append(Waiting(f"c{draw.randrange(4)}", draw.randrange(1, 900), draw.randrange(-1, 2)))
                queue.put(inside[-1])
            case 1 if inside:
                head = queue.head()
                assert head is queue.head()  # looking changes nothing
                taken = queue.take()
                assert taken is head
                own = [each for each in inside if each.client == taken.client]
                assert taken is min(own, key=lambda each: each.key)
                inside.remove(taken)
            case 2 if inside:
                queue.remove(inside.pop(draw.randrange(len(inside))))
        assert (len(queue), queue.cost) == (len(inside), sum(each.cost for each in inside))
        assert queue.num_clients == len({each.client for each in inside})
        for client in range(4):
            assert queue.cost_of(f"c{client}") == sum(each.cost for each in inside if each.client == f"c{client}")
    while inside:
        inside.remove(queue.take())
    assert queue.head() is None
    with pytest.raises(IndexError):
        queue.take()


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), quantum=st.integers(20, 600), others=st.integers(1, 6))
def test_nobody_starves(seed: int, quantum: int, others: int) -> None:
    """A flood of others that never ends: until a newcomer's last is taken, each of them gets what the newcomer does,
    but for the bound."""
    draw = random.Random(seed)
    queue = FairQueue(quantum)

    def flood(client: str) -> None:
        queue.put(Waiting(client, draw.randrange(1, 900)))

    for number in range(10 * others):
        flood(f"c{number % others}")
    for _ in range(draw.randrange(30)):
        flood(queue.take().client)
    own = [Waiting("new", draw.randrange(1, 900)) for _ in range(draw.randrange(1, 4))]
    for each in own:
        queue.put(each)
    taken = 0
    while (each := queue.take()) is not own[-1]:
        taken += each.cost
        if each.client != "new":
            flood(each.client)
    asked = sum(each.cost for each in own)
    assert taken <= asked * (others + 1) + others * (2 * 900 + quantum)


def test_who_is_in_front() -> None:
    queue = FairQueue(100)
    for client, cost in (("flood", 500), ("flood", 500), ("b", 30)):
        queue.put(Waiting(client, cost))
    assert queue.in_front("c", 20) == 20 * 3
    assert queue.in_front("b", 20) == (30 + 20) * 2
    assert queue.in_front("flood", 20) == 1020 + 2 * 30


def test_the_last_of_the_costliest_line_gives_way() -> None:
    queue = FairQueue(100)
    assert queue.last_of_longest() is None
    for client, cost in (("a", 50), ("b", 300), ("a", 60), ("c", 10), ("c", 10), ("c", 10)):
        queue.put(Waiting(client, cost))
    victim = queue.last_of_longest()
    assert victim is not None
    assert (victim.client, victim.cost) == ("b", 300)
    queue.remove(victim)
    with pytest.raises(KeyError):
        queue.remove(victim)
    victim = queue.last_of_longest()
    assert victim is not None
    assert (victim.client, victim.cost) == ("a", 60)


def test_a_quantum_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="quantum must be at least 1, not 0"):
        FairQueue(0)
