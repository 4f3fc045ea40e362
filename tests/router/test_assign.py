"""``assign`` against a definition in plain Python."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.router.assign import assign, lay_out
from moestro.router.balance import Topology, balance
from moestro.router.placement import EMPTY, Placement, spread

torch.set_num_threads(1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Placement, tuple[int, ...], torch.Tensor]:
    """A placement with replicas, its nodes, and a batch in which no token names an expert twice."""
    experts, ranks = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    load = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    topology = Topology(tuple(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))))
    (placement,) = balance([load], topology, -(-experts // ranks) + draw(st.integers(0, 3)))
    tokens, k = draw(st.integers(0, 20)), draw(st.integers(1, experts))
    batch = [draw(st.permutations(range(experts)))[:k] for _ in range(tokens)]
    return placement, topology.node_of_rank, torch.tensor(batch, dtype=torch.int64).reshape(tokens, k)


@settings(deadline=None)
@given(cases())
def test_the_tokens_of_an_expert_are_dealt_evenly_and_to_the_nearest_first(case) -> None:
    placement, nodes, ids_TK = case
    capacity, expert_in = placement.capacity, [e for experts in placement.slots for e in experts]
    for rank in range(placement.num_ranks):
        slots_TK = assign(ids_TK, lay_out(placement, rank, "cpu", nodes))
        assert slots_TK.shape == ids_TK.shape
        assert slots_TK.dtype == torch.int64
        dealt: dict[int, list[int]] = {}
        for expert, slot in zip(ids_TK.flatten().tolist(), slots_TK.flatten().tolist(), strict=True):
            assert expert_in[slot] == expert
            dealt.setdefault(expert, []).append(slot)
        for expert, slots in dealt.items():
            replicas = placement.slots_of_expert[expert]
            counts = Counter(slots)
            assert {counts[slot] for slot in replicas} <= {len(slots) // len(replicas), -(-len(slots) // len(replicas))}
            distance = [0 if s // capacity == rank else 1 if nodes[s // capacity] == nodes[rank] else 2 for s in slots]
            round_ = distance[: len(replicas)]  # in a round each is used once, the nearest first
            assert round_ == sorted(round_)
            assert slots == [slots[n % len(replicas)] for n in range(len(slots))]


@settings(deadline=None)
@given(cases())
def test_the_result_depends_on_the_batch_alone(case) -> None:
    placement, nodes, ids_TK = case
    layout = lay_out(placement, 0, "cpu", nodes)
    first = assign(ids_TK, layout)
    assign(ids_TK.flip(0), layout)
    assert torch.equal(assign(ids_TK.clone(), layout), first)


@pytest.mark.parametrize("holders", [(0, 1), (0, 2), (1, 3, 6), (5,)])
def test_ranks_with_single_tokens_do_not_all_choose_the_same_copy(holders: tuple[int, ...]) -> None:
    placement = Placement(1, tuple((0,) if rank in holders else (EMPTY,) for rank in range(8)))
    ids_TK = torch.zeros(1, 1, dtype=torch.int64)
    chosen = [int(assign(ids_TK, lay_out(placement, rank, "cpu"))) for rank in range(8)]
    assert all(chosen[rank] == rank for rank in holders)
    assert set(Counter(chosen).values()) <= {8 // len(holders), -(-8 // len(holders))}


def test_the_same_node_comes_before_another() -> None:
    placement = Placement(1, ((0,), (EMPTY,), (0,), (EMPTY,)))
    ids_TK = torch.zeros(3, 1, dtype=torch.int64)
    nodes = (0, 0, 1, 1)
    assert [assign(ids_TK, lay_out(placement, r, "cpu", nodes)).flatten().tolist() for r in range(4)] == [
        [0, 2, 0],
        [0, 2, 0],
        [2, 0, 2],
        [2, 0, 2],
    ]


def test_one_token_takes_the_first_choice_as_in_any_batch() -> None:
    (placement,) = balance([[9.0, 5, 1, 1]], Topology.regular(4, 4), 3)
    layout = lay_out(placement, 2, "cpu")
    batch = torch.tensor([[0, 1], [2, 0]])
    assert layout.max_replicas > 1
    assert torch.equal(assign(batch[:1], layout), assign(batch, layout)[:1])


def test_without_replicas_every_expert_is_where_it_is() -> None:
    layout = lay_out(spread(5, 2), 1, "cpu")
    assert layout.max_replicas == 1
    assert assign(torch.tensor([[4, 0], [2, 1]]), layout).tolist() == [[5, 0], [3, 1]]


@pytest.mark.parametrize("replicas", [False, True])
def test_assignment_makes_no_shape_or_value_that_must_be_read_back(replicas: bool) -> None:
    """Tensors on the meta device have no values: whatever reads one (item, nonzero, a mask) fails there."""
    placement = spread(4, 2, 4)
    if replicas:
        (placement,) = balance([[9.0, 5, 1, 1]], Topology.regular(2, 2), 4)
    slots_TK = assign(torch.zeros(6, 2, dtype=torch.int64, device="meta"), lay_out(placement, 0, "meta"))
    assert slots_TK.shape == (6, 2)


@pytest.mark.parametrize(
    ("rank", "nodes", "message"),
    [
        (2, None, r"rank must be in \[0, 2\), got 2"),
        (-1, None, r"rank must be in \[0, 2\), got -1"),
        (0, (0,), "node_of_rank must have 2 ranks, got 1"),
    ],
)
def test_a_layout_for_ranks_that_are_not_there_is_refused(rank: int, nodes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lay_out(spread(2, 2), rank, "cpu", nodes)
