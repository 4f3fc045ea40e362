from __future__ import annotations

import threading

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cpu import needs_cpu_kernels

from moestro.kernels.cpu.experts import CpuExperts, make_cpu_experts
from moestro.kernels.grouped_experts import ExpertShape, experts_reference, mix_sorted, sort_by_slot

pytestmark = needs_cpu_kernels


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Weights:
    """Of L experts, and a call's inputs."""

    def __init__(self, num_slots, model_width, width, seed):
        self.num_slots, self.seed = num_slots, seed
        self.gate_up_L2ID = random(num_slots, 2 * width, model_width, seed=seed) * model_width**-0.5
        self.down_LDI = random(num_slots, model_width, width, seed=seed + 1) * width**-0.5
        self.shape = ExpertShape(width, model_width, torch.bfloat16, torch.device("cpu"))

    def fill(self, expert):
        def fill(gate_up_2ID, down_DI):
            gate_up_2ID.copy_(self.gate_up_L2ID[expert])
            down_DI.copy_(self.down_LDI[expert])

        return fill

    def make(self) -> CpuExperts:
        return make_cpu_experts(self.shape, [self.fill(e) for e in range(self.num_slots)])

    def call(self, tokens, k):
        generator = torch.Generator().manual_seed(self.seed + 2)
        x_TD = torch.randn(tokens, self.shape.model_width, generator=generator).bfloat16()
        slots_TK = torch.rand(tokens, self.num_slots, generator=generator).topk(k).indices
        return x_TD, slots_TK, torch.rand(tokens, k, generator=generator)

    def check(self, x_RD, counts_L, got):
        """Rounding of the hidden row and of the result, each relative to the terms of a sum."""
        want = experts_reference(x_RD, counts_L, self.gate_up_L2ID, self.down_LDI)
        scale = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=0, atol=2 * 2**-8 * scale)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize(("model_width", "width"), [(48, 32), (40, 24), (33, 17), (65, 15), (96, 80), (1, 1)])
@pytest.mark.parametrize(
    ("num_slots", "tokens", "k"), [(4, 1, 4), (8, 9, 8), (1, 7, 1), (3, 0, 2), (5, 60, 1), (12, 33, 3)]
)
def test_definition(threads, model_width, width, num_slots, tokens, k):
    weights = Weights(num_slots, model_width, width, seed=17)
    experts = weights.make()
    x_TD, slots_TK, weights_TK = weights.call(tokens, k)
    x_RD, counts_L, _ = sort_by_slot(x_TD, slots_TK, num_slots)
    weights.check(x_RD, counts_L, experts.apply(x_RD, counts_L))
    got, want = experts.mix(x_TD, slots_TK, weights_TK), mix_sorted(experts, num_slots, x_TD, slots_TK, weights_TK)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[1].dtype == torch.int64


def test_a_token_does_not_depend_on_the_tokens_beside_it():
    weights = Weights(6, 64, 48, seed=3)
    experts = weights.make()
    x_TD, slots_TK, weights_TK = weights.call(130, 3)
    alone = torch.cat([experts.mix(x_TD[t : t + 1], slots_TK[t : t + 1], weights_TK[t : t + 1])[0] for t in range(130)])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(4))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 131):
            got, _ = experts.mix(x_TD[:rows], slots_TK[:rows], weights_TK[:rows])
            assert torch.equal(got, alone[:rows]), (rows, threads)
        got, _ = experts.mix(x_TD[order], slots_TK[order], weights_TK[order])
        assert torch.equal(got, alone[order])
    torch.set_num_threads(1)


def test_where_an_expert_lies_does_not_matter(threads):
    weights = Weights(5, 64, 32, seed=5)
    x_TD, slots_TK, weights_TK = weights.call(40, 2)
    where = torch.tensor([3, 0, 4, 2, 1])
    moved = make_cpu_experts(weights.shape, [weights.fill(int(e)) for e in where.argsort()])
    want, counts_L = weights.make().mix(x_TD, slots_TK, weights_TK)
    got, moved_counts_L = moved.mix(x_TD, where[slots_TK], weights_TK)
    assert torch.equal(got, want)
    assert torch.equal(moved_counts_L[where], counts_L)


def test_all_tokens_to_one_expert(threads):
    weights = Weights(3, 64, 32, seed=6)
    x_TD, _, _ = weights.call(600, 1)
    counts_L = torch.tensor([0, 600, 0])
    weights.check(x_TD, counts_L, got := weights.make().apply(x_TD, counts_L))
    mixed, counts = weights.make().mix(x_TD, torch.ones(600, 1, dtype=torch.int64), torch.ones(600, 1))
    assert torch.equal(mixed, got)
    assert counts.tolist() == [0, 600, 0]


def test_padding_is_zero_and_stays_apart(threads):
    weights = Weights(3, 48, 32, seed=7)
    experts, counts_L = weights.make(), torch.tensor([2, 0, 3])
    x_RD = random(9, 48, seed=8)
    x_RD[5:] = float("nan")
    got = experts.apply(x_RD, counts_L)
    weights.check(x_RD[:5], counts_L, got[:5])
    assert not got[5:].any()


def test_nan_stays_in_its_token(threads):
    weights = Weights(4, 64, 40, seed=9)
    experts = weights.make()
    x_TD, slots_TK, weights_TK = weights.call(20, 2)
    want, _ = experts.mix(x_TD, slots_TK, weights_TK)
    x_TD[3], weights_TK[11, 1] = float("nan"), float("nan")
    got, _ = experts.mix(x_TD, slots_TK, weights_TK)
    others = [token for token in range(20) if token not in (3, 11)]
    assert torch.equal(got[others], want[others])
    assert got[[3, 11]].isnan().all()


def test_rows_may_lie_apart():
    weights = Weights(4, 33, 17, seed=10)
    experts = weights.make()
    _, slots_TK, weights_TK = weights.call(6, 2)
    x_TD = random(6, 80, seed=11)[:, 7:40]
    assert torch.equal(experts.mix(x_TD, slots_TK, weights_TK)[0], experts.mix(x_TD.clone(), slots_TK, weights_TK)[0])


def test_experts_are_staged_beside_running_ones():
    weights = Weights(4, 64, 96, seed=12)
    experts = make_cpu_experts(weights.shape, [weights.fill(0), weights.fill(1), None, None])
    x_TD, slots_TK, weights_TK = weights.call(8, 2)
    before, _ = experts.mix(x_TD, slots_TK % 2, weights_TK)
    staged: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: staged.extend(experts.stage(weights.fill(e)) for e in (2, 3) * 20))
    thread.start()
    while thread.is_alive():
        assert torch.equal(experts.mix(x_TD, slots_TK % 2, weights_TK)[0], before)
    thread.join()
    for slot in (2, 3):
        experts.replace_(slot, staged[slot - 2])
    assert torch.equal(experts.mix(x_TD, slots_TK, weights_TK)[0], weights.make().mix(x_TD, slots_TK, weights_TK)[0])


def test_calls_keep_no_memory():
    weights = Weights(8, 128, 64, seed=13)
    experts = weights.make()
    x_TD, slots_TK, weights_TK = weights.call(64, 4)
    for _ in range(50):
        experts.mix(x_TD, slots_TK, weights_TK)
    before = psutil.Process().memory_info().rss
    for calls in range(1000):
        experts.mix(x_TD[: 1 + calls % 64], slots_TK[: 1 + calls % 64], weights_TK[: 1 + calls % 64])
    assert psutil.Process().memory_info().rss - before < 4 << 20


def test_dropped_weights_go_back():
    """Small weights share a mapping, which lives as long as the last of them; so it takes more than one to see."""
    weights = Weights(2, 1024, 1024, seed=14)
    kept = [weights.make() for _ in range(8)]
    before = psutil.Process().memory_info().rss
    kept.clear()
    assert before - psutil.Process().memory_info().rss > 6 * 2 * weights.shape.num_bytes


def test_what_does_not_fit_is_refused():
    weights = Weights(3, 48, 32, seed=15)
    experts = weights.make()
    x_TD, slots_TK, weights_TK = weights.call(4, 2)
    for slot in (-1, 3):
        with pytest.raises(IndexError, match="slot"):
            experts.mix(x_TD, torch.full_like(slots_TK, slot), weights_TK)
    with pytest.raises(ValueError, match="adds up to 5 of 4"):
        experts.apply(x_TD, torch.tensor([0, 2, 3]))
    with pytest.raises(TypeError, match="BFloat16"):
        experts.mix(x_TD.float(), slots_TK, weights_TK)


@settings(max_examples=50, deadline=None)
@given(
    num_slots=st.integers(1, 9),
    model_width=st.integers(1, 100),
    width=st.integers(1, 70),
    tokens=st.integers(1, 40),
    k=st.integers(1, 8),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_shape(num_slots, model_width, width, tokens, k, threads, seed):
    weights = Weights(num_slots, model_width, width, seed)
    x_TD, slots_TK, weights_TK = weights.call(tokens, min(k, num_slots))
    experts = weights.make()
    torch.set_num_threads(threads)
    got, counts_L = experts.mix(x_TD, slots_TK, weights_TK)
    torch.set_num_threads(1)
    x_RD, want_counts_L, _ = sort_by_slot(x_TD, slots_TK, num_slots)
    assert torch.equal(counts_L, want_counts_L)
    weights.check(x_RD, counts_L, experts.apply(x_RD, counts_L))
    t = seed % tokens
    assert torch.equal(experts.mix(x_TD[t : t + 1], slots_TK[t : t + 1], weights_TK[t : t + 1])[0], got[t : t + 1])
    assert torch.equal(got, mix_sorted(experts, num_slots, x_TD, slots_TK, weights_TK)[0])


@needs_cpu_kernels
def test_the_activation_of_very_large_gates():
    """silu(x) is x far above zero and nothing far below, also where e to the x is no number any more."""
    gates = torch.tensor([1e9, 1e13, 1e20, 1e30, -1e9, -1e13, -1e20, -1e30]).bfloat16()
    width = len(gates)

    def fill(gate_up_2ID: torch.Tensor, down_DI: torch.Tensor) -> None:
        gate_up_2ID[:width, 0], gate_up_2ID[width:, 0] = gates, 1
        down_DI.copy_(torch.eye(width))

    shape = ExpertShape(width, width, torch.bfloat16, torch.device("cpu"))
    x_RD = torch.zeros(1, width, dtype=torch.bfloat16)
    x_RD[0, 0] = 1
    y_RD = make_cpu_experts(shape, [lambda a, b: (a.zero_(), fill(a, b))]).apply(x_RD, torch.tensor([1]))
    assert torch.equal(y_RD[0], gates.clamp(min=0))


def test_slots_that_come_and_go_leave_no_memory_behind():
    weights = Weights(6, 256, 256, seed=5)
    x_RD = random(6, 256, seed=9)
    wanted = [make_cpu_experts(weights.shape, [weights.fill(e)]).apply(x_RD, torch.tensor([6])) for e in range(6)]
    experts = make_cpu_experts(weights.shape, [weights.fill(e) for e in range(4)], room=6)
    staged = [experts.stage(weights.fill(e)) for e in (4, 5)]

    def round_trip(experts):
        """To six slots and back to four, of which two have changed places."""
        experts = experts.with_slots([0, 1, 2, 3, None, None])
        experts.replace_(4, staged[0])
        experts.replace_(5, staged[1])
        for slot in range(6):
            counts_L = torch.zeros(6, dtype=torch.int64)
            counts_L[slot] = 6
            assert torch.equal(experts.apply(x_RD, counts_L), wanted[slot])
        experts = experts.with_slots([5, 1, 0, None])
        for slot, expert in enumerate((5, 1, 0)):
            counts_L = torch.tensor([6 * (slot == i) for i in range(4)])
            assert torch.equal(experts.apply(x_RD, counts_L), wanted[expert])
        experts = experts.with_slots([2, 1, None, None])
        for slot, expert in ((2, 2), (3, 3)):
            experts.replace_(slot, experts.stage(weights.fill(expert)))
        return experts

    experts = round_trip(experts)
    before = psutil.Process().memory_info().rss
    for _ in range(50):
        experts = round_trip(experts)
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    with pytest.raises(ValueError, match="7 slots, but there is room for 6"):
        experts.with_slots([None] * 7)
