"""The solver's promises, as properties. Loads are small integers, so that sums in the tests are exact."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moestro.router.balance import NEGLIGIBLE, TOLERANCE, Topology, balance, balancedness
from moestro.router.placement import EMPTY, Placement, moves, spread

MEASURED_AS = 1 + 2 * NEGLIGIBLE


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Any load, one or several nodes, groups or none, spare slots or none; more ranks than experts too."""
    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups, group_size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    ranks, experts = nodes * ranks_per_node, groups * group_size
    load = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    return {
        "load_LE": np.array(draw(st.lists(load, min_size=1, max_size=3)), dtype=np.float64),
        "topology": Topology.regular(ranks, ranks_per_node),
        "capacity": -(-experts // ranks) + draw(st.integers(0, 4)),
        "num_groups": draw(st.sampled_from([1, groups])),
    }


def rank_loads(load_E: np.ndarray, placement: Placement) -> list[Fraction]:
    """The definition: an expert's load is shared equally by its replicas."""
    copies = [len(slots) for slots in placement.slots_of_expert]
    return [
        sum((Fraction(int(load_E[e])) / copies[e] for e in experts if e != EMPTY), Fraction())
        for experts in placement.slots
    ]


def fullest(load_E: np.ndarray, placement: Placement) -> Fraction:
    return max(rank_loads(load_E, placement))


def random_placement(rng: np.random.Generator, num_experts: int, num_ranks: int, capacity: int) -> Placement:
    """Any valid placement: every expert on some rank, then copies here and there."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in rng.permutation(num_experts).tolist():
        held[rng.choice([r for r, h in enumerate(held) if len(h) < capacity])].append(expert)
    for h in held:
        for expert in rng.permutation(num_experts).tolist():
            if len(h) < capacity and expert not in h and rng.random() < 0.3:
                h.append(expert)
    slots = [rng.permutation(h + [EMPTY] * (capacity - len(h))).tolist() for h in held]
    return Placement(num_experts, tuple(map(tuple, slots)))


@settings(deadline=None)
@given(problems())
@example({"load_LE": np.zeros((2, 6)), "topology": Topology.regular(3, 3), "capacity": 3})  # no load at all
@example({"load_LE": np.ones((1, 5)), "topology": Topology.regular(1, 1), "capacity": 5})  # one rank
@example({"load_LE": np.ones((1, 2)), "topology": Topology.regular(8, 4), "capacity": 1})  # more ranks than experts
@example({"load_LE": np.ones((1, 2)), "topology": Topology.regular(2, 2), "capacity": 5})  # capacity above experts
def test_every_expert_has_a_slot_and_no_rank_two_copies(problem) -> None:
    """Placement refuses a missing expert, one twice on a rank and unequal ranks; the shape is left to check."""
    load_LE, topology = problem["load_LE"], problem["topology"]
    plan = balance(**problem)
    assert len(plan) == len(load_LE)
    for placement in plan:
        assert placement.num_experts == load_LE.shape[1]
        assert (placement.num_ranks, placement.capacity) == (topology.num_ranks, problem["capacity"])


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_previous_placements_of_any_kind_are_left_or_improved(problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    load_LE, ranks = problem["load_LE"], problem["topology"].num_ranks
    problem = problem | {"num_groups": 1}
    old = tuple(random_placement(rng, load_LE.shape[1], ranks, problem["capacity"]) for _ in load_LE)
    best, new = balance(**problem), balance(**problem, previous=old)
    for load_E, before, after, ideal in zip(load_LE, old, new, best, strict=True):
        allowed = fullest(load_E, ideal) * Fraction(1 + 2 * TOLERANCE + 1e-6)
        assert fullest(load_E, after) <= max(allowed, Fraction(0))
        if fullest(load_E, before) <= fullest(load_E, ideal):
            assert after == before, "moved although the previous placement was as good"
        for left, came in zip(before.slots, after.slots, strict=True):
            for slot, expert in enumerate(came):
                assert expert == EMPTY or expert not in left or left[slot] == expert, "moved within its rank"


@settings(deadline=None)
@given(problems())
def test_its_own_plan_is_never_moved(problem) -> None:
    plan = balance(**problem)
    assert balance(**problem, previous=plan) == plan
    assert balance(**problem, previous=plan, tolerance=0) == plan


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_balanced_load_moves_nothing(per_rank: int, ranks: int, spare: int, seed: int) -> None:
    """Whatever the loads of experts: each rank's add up to the same."""
    rng = np.random.default_rng(seed)
    load_RE = np.stack([rng.permutation(rng.multinomial(1000, [1 / per_rank] * per_rank)) for _ in range(ranks)])
    old = spread(ranks * per_rank, ranks, per_rank + spare)
    topology = Topology.regular(ranks, ranks)
    assert balance(load_RE.reshape(1, -1), topology, per_rank + spare, previous=(old,), tolerance=0) == (old,)


@settings(deadline=None)
@given(problems())
def test_spare_slots_never_raise_the_fullest_rank(problem) -> None:
    load_LE, ranks = problem["load_LE"], problem["topology"].num_ranks
    if load_LE.shape[1] % ranks:
        load_LE = np.repeat(load_LE, ranks, axis=1)
    least = load_LE.shape[1] // ranks
    problem = problem | {"load_LE": load_LE, "capacity": least + problem["capacity"]}
    for load_E, with_spare, without in zip(
        load_LE, balance(**problem), balance(**problem | {"capacity": least}), strict=True
    ):
        assert fullest(load_E, with_spare) <= fullest(load_E, without) * Fraction(MEASURED_AS)


@settings(deadline=None)
@given(problems(), st.sampled_from([2.0**-40, 3, 10, 1000, 2.0**200]))
def test_only_ratios_of_loads_matter(problem, factor: float) -> None:
    assert balance(**problem | {"load_LE": problem["load_LE"] * factor}) == balance(**problem)


@settings(deadline=None)
@given(problems())
def test_layers_do_not_affect_each_other(problem) -> None:
    alone = [balance(**problem | {"load_LE": load_E[None]})[0] for load_E in problem["load_LE"]]
    assert list(balance(**problem)) == alone


@pytest.mark.parametrize("has_previous", [False, True])
@pytest.mark.parametrize("node_of_rank", [(0, 0, 1, 1), (0, 1, 0, 1)])
def test_groups_stay_within_nodes_where_they_can_be_dealt(node_of_rank, has_previous: bool) -> None:
    rng = np.random.default_rng(0)
    topology, load_LE = Topology(node_of_rank), rng.lognormal(0, 1, (5, 16))
    previous = tuple(random_placement(rng, 16, 4, 6) for _ in load_LE) if has_previous else None
    for load_E, placement in zip(load_LE, balance(load_LE, topology, 6, num_groups=4, previous=previous), strict=True):
        nodes = [{node_of_rank[slot // 6] for slot in slots} for slots in placement.slots_of_expert]
        of_group = [set.union(*nodes[4 * g : 4 * g + 4]) for g in range(4)]
        assert sorted(n for group in of_group for n in group) == [0, 0, 1, 1]
        # Within its node each rank is near the node's mean.
        loads = np.array([float(x) for x in rank_loads(load_E * 1e6, placement)])
        for node in (0, 1):
            mine = loads[[n == node for n in node_of_rank]]
            assert mine.mean() / mine.max() > 0.9


def test_groups_play_no_part_where_nodes_differ_or_groups_do_not_go_round() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (3, 12))
    plain = balance(load_LE, Topology((0, 0, 0, 1)), 4)
    assert balance(load_LE, Topology((0, 0, 0, 1)), 4, num_groups=4) == plain
    assert balance(load_LE, Topology((0, 0, 1, 1)), 4, num_groups=3) == plain


@pytest.mark.parametrize(("ranks", "capacity", "goal"), [(8, 17, 0.95), (32, 5, 0.93), (64, 3, 0.90)])
def test_balance_and_bytes_on_skewed_and_drifting_popularity(ranks: int, capacity: int, goal: float) -> None:
    """The goals of the project; benchmarks/placement.py compares with EPLB, which moves nearly every slot."""
    rng = np.random.default_rng(1)
    load_LE = rng.lognormal(0, 1.0, (8, 128))
    plan = balance(load_LE, Topology.regular(ranks, 8), capacity)
    for _ in range(2):
        assert np.mean([balancedness(x, p) for x, p in zip(load_LE, plan, strict=True)]) >= goal
        load_LE = load_LE * rng.lognormal(0, 0.1, load_LE.shape)
        old, plan = plan, balance(load_LE, Topology.regular(ranks, 8), capacity, previous=plan)
        moved = sum(len(moves(a, b)) for a, b in zip(old, plan, strict=True))
        assert moved <= 0.3 * len(plan) * ranks * capacity


def test_a_gain_within_the_tolerance_moves_nothing_and_a_larger_one_little() -> None:
    old = Placement(4, ((0, 1), (2, 3)))
    two_nodes = Topology.regular(2, 2)
    slightly, clearly = [[52.0, 50, 49, 49]], [[80.0, 50, 49, 21]]
    assert balance(slightly, two_nodes, 2, previous=(old,)) == (old,)
    (new,) = balance(clearly, two_nodes, 2, previous=(old,))
    assert len(moves(old, new)) == 2
    assert balancedness(clearly[0], new) > 0.97 > balancedness(clearly[0], old)


def test_one_hot_expert_gets_the_spare_slots() -> None:
    (plan,) = balance([[9.0, 1, 1, 1]], Topology.regular(4, 4), 2)
    assert len(plan.slots_of_expert[0]) == 4
    assert balancedness([9.0, 1, 1, 1], plan) > 0.8


def test_balancedness_is_mean_over_max() -> None:
    assert balancedness([3.0, 1, 0], Placement(3, ((0, EMPTY), (1, 2)))) == 2 / 3
    assert balancedness([4.0, 1], Placement(2, ((0, 1), (0, EMPTY)))) == 2.5 / 3
    assert balancedness([0.0, 0], spread(2, 2)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_LE": [[1, -2.0]]}, r"load_LE\[0, 1\] must be finite and at least 0, got -2.0"),
        ({"load_LE": [[1, float("nan")]]}, r"load_LE\[0, 1\] must be finite"),
        ({"load_LE": [1, 2]}, r"load_LE must have the shape \(layers, experts\).*got \(2,\)"),
        ({"load_LE": np.zeros((1, 0))}, r"load_LE must have the shape"),
        ({"capacity": 0}, "capacity must be at least 1 to hold 2 experts on 2 ranks, got 0"),
        ({"topology": Topology(())}, "topology must have at least 1 rank"),
        ({"num_groups": 3}, "num_groups must divide 2 experts, got 3"),
        ({"num_groups": 0}, "num_groups must divide 2 experts, got 0"),
        ({"tolerance": -0.1}, "tolerance must be finite and at least 0, got -0.1"),
        ({"previous": ()}, "previous must have 1 layers as load_LE has, got 0"),
        (
            {"previous": (spread(2, 1),)},
            r"previous\[0\]: experts, ranks and capacity must be \(2, 2, 1\), got \(2, 1, 2\)",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message: str) -> None:
    arguments = {"load_LE": [[1.0, 2.0]], "topology": Topology.regular(2, 2), "capacity": 1} | changes
    with pytest.raises(ValueError, match=message):
        balance(**arguments)


def weighted(load_E: np.ndarray, placement: Placement, slowness: list[float]) -> float:
    return max(float(load) * slow for load, slow in zip(rank_loads(load_E, placement), slowness, strict=True))


@settings(deadline=None, max_examples=40)
@given(problems(), st.data())
def test_slow_ranks_get_less_and_the_plan_is_never_worse_for_it(
    problem: dict[str, object], data: st.DataObject
) -> None:
    """Than one copy of each expert on the ranks in order, or what was there before. (Whole groups on nodes are another
    promise, which may cost more.)"""
    topology, load_LE = problem["topology"], problem["load_LE"]
    assert isinstance(topology, Topology)
    assert isinstance(load_LE, np.ndarray)
    problem["num_groups"] = 1
    slowness = data.draw(
        st.lists(st.sampled_from([1.0, 1.5, 4.0]), min_size=topology.num_ranks, max_size=topology.num_ranks)
    )
    plain = balance(**problem)  # type: ignore[arg-type]
    slowed = balance(**problem, previous=plain, tolerance=0, slowness=slowness)  # type: ignore[arg-type]
    for load_E, old, new in zip(load_LE, plain, slowed, strict=True):
        assert weighted(load_E, new, slowness) <= weighted(load_E, old, slowness) * MEASURED_AS + 1e-9
    if len(set(slowness)) == 1:
        assert balance(**problem, slowness=slowness) == plain  # type: ignore[arg-type]


def test_a_slow_rank_gets_as_many_times_less_where_slots_allow() -> None:
    load_LE = np.full((1, 32), 10.0)
    (placement,) = balance(load_LE, Topology.regular(4, 4), 12, slowness=[1, 5, 1, 1])
    rows = [float(load) / 10 for load in rank_loads(load_LE[0], placement)]
    assert rows[1] <= 2
    assert max(rows) <= 10.5


@pytest.mark.parametrize("slowness", [[1.0], [1.0, 0.5], [1.0, float("inf")]])
def test_slowness_is_checked(slowness: list[float]) -> None:
    with pytest.raises(ValueError, match="slowness must have 2 ranks, each finite and at least 1"):
        balance(np.ones((1, 4)), Topology.regular(2, 2), 2, slowness=slowness)
