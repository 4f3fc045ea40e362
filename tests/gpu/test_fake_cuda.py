"""A step on an accelerator, without one: torch's fake tensors know their device and refuse what needs values.

A fake tensor has no data, so anything for which the host would have to wait (``tolist``, ``nonzero``, ``bincount``, a
boolean mask) raises, and so does an operation between a CPU tensor and one of the device. The device is "meta", since
a torch without CUDA cannot even index a fake CUDA tensor. What it cannot show is whether a
kernel accepts the shapes and strides: that is what ``benchmarks.gpu_suite`` is for.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.small_models import MODELS, make_model
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from moestro.kernels import grouped_experts
from moestro.kernels.grouped_experts import (
    ExpertShape,
    LoopedExperts,
    StackedExperts,
    can_stack,
    experts_reference,
    make_experts,
)
from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.router.expert_parallel import all_here
from moestro.router.mesh import Collectives
from moestro.router.parallel import NoTensorParallel
from moestro.router.transport import LocalTransport
from moestro.router.transports.all_to_all import AllToAllTransport
from moestro.router.transports.fixed_capacity import FixedCapacityTransport, bucket_of
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.workers.architectures import parse_config
from moestro.workers.batching import build_batch
from moestro.workers.loading import Need
from moestro.workers.model.decoder import Decoder, build_decoder
from moestro.workers.model.moe import MoeMlp
from moestro.workers.scheduler_sequence import SequenceState, Span, StepPlan

DEVICE = torch.device("meta")


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors on a device that the code takes for CUDA, and what they do not know: pinned memory, the grouped
    product, and that a tensor made of a list on the device waits for a copy."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(
        grouped_experts, "can_stack", lambda w, m, dtype, _: can_stack(w, m, dtype, torch.device("cuda"))
    )
    make_tensor = torch.tensor

    def tensor(values, **options):
        device = torch.device(options.pop("device", None) or "cpu")
        assert device.type == "cpu" or building, f"torch.tensor({values}, device={device}) waits for the device"
        return make_tensor(values, **options).to(device)

    building: list[int] = [1]
    monkeypatch.setattr(torch, "tensor", tensor)

    def grouped_mm(rows_RK, weights_LKN, *, offs):
        assert rows_RK.dtype == weights_LKN.dtype == torch.bfloat16
        assert offs.dtype == torch.int32
        assert rows_RK.shape[1] == weights_LKN.shape[1]
        assert offs.shape == weights_LKN.shape[:1]
        assert rows_RK.stride(1) == 1
        assert rows_RK.stride(0) % 8 == 0, "rows are multiples of 16 bytes"
        assert weights_LKN.stride(1) == 1, "column major"
        assert weights_LKN.stride(2) % 8 == 0
        return rows_RK.new_empty(rows_RK.shape[0], weights_LKN.shape[2])

    monkeypatch.setattr(torch, "_grouped_mm", grouped_mm)
    with FakeTensorMode() as mode:
        mode.built = building.clear  # from then on a step is being computed
        yield mode


def config_of(name: str):
    raw = make_model(name).config.to_dict()
    raw["architectures"] = [f"{MODELS[name][0]}ForCausalLM"]
    return parse_config({key: value for key, value in raw.items() if value is not None})


def plan_of(num_groups: int, spans: list[tuple[int, int, int]]) -> StepPlan:
    """(start, length, known tokens) of each span; decodes first."""
    made = []
    for index, (start, length, known) in enumerate(spans):
        request = SequenceRequest(str(index), tuple(range(1, known + 1)), SamplingParams(temperature=0.0))
        sequence = SequenceState(request, index, 512, num_groups, 0.0)
        for table in sequence.block_tables:
            table.extend(range(1 + index * 16, 1 + index * 16 + -(-(start + length) // 8)))
        made.append(Span(sequence, start, length, start + length == known))
    decodes = sum(length == 1 for _, length, _ in spans)
    return StepPlan(tuple(made), decodes, sum(length for _, length, _ in spans), 0.0)


STEPS = {
    "one decode": [(40, 1, 41)],
    "decodes of one length": [(40, 1, 41), (40, 1, 41)],
    "decodes of many lengths": [(40, 1, 41), (3, 1, 4), (100, 1, 101)],
    "prompts": [(0, 30, 30), (0, 5, 5)],
    "decodes beside a second chunk": [(40, 1, 41), (9, 1, 10), (16, 20, 50)],
}
CONFIGS = {name: config_of(name) for name in MODELS}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_and_stays_on_the_device(fake, name, step):
    decoder = decoder_on_fake_cuda(name)
    assert_experts_are_stacked(decoder)
    fake.built()
    plan = plan_of(decoder.cache_spec.num_groups, STEPS[step])
    batch, _ = build_batch(plan, (plan.num_tokens,), 8, DEVICE)
    logits = decoder.forward(batch, decoder.cache_spec.allocate(64, 8))
    assert logits.device == DEVICE
    assert logits.dtype == torch.float32
    assert logits.shape == (sum(start + length == known for start, length, known in STEPS[step]), 101)


@pytest.mark.parametrize("name", MODELS)
def test_an_idle_step_never_waits(fake, name):
    decoder = decoder_on_fake_cuda(name)
    fake.built()
    batch, _ = build_batch(plan_of(1, []), (0,), 8, DEVICE)
    logits = decoder.forward(batch, decoder.cache_spec.allocate(64, 8))
    assert (logits.device, logits.shape) == (DEVICE, (0, 101))


def decoder_on_fake_cuda(name: str) -> Decoder:
    config = CONFIGS[name]
    source = Need(torch.bfloat16, DEVICE)  # hands out nothing: there are no values here
    return build_decoder(config, source, NoTensorParallel(), all_here(config.num_experts, config.num_moe_layers))


def assert_experts_are_stacked(decoder) -> None:
    for layer in decoder.layers:
        if isinstance(layer.mlp, MoeMlp):
            assert isinstance(layer.mlp.bank.experts, StackedExperts)


class NoWork:
    """A collective over fake tensors: what arrives has a shape, and that is all there is to know."""

    def alltoall_base(self, out, x, receive, send):
        assert all(type(size) is int for size in (*receive, *send)), "sizes are the host's"
        assert (out.shape[0], x.shape[0]) == (sum(receive), sum(send))
        return self

    def wait(self):
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("busiest", [0, 1, 3, 4, 17])
def test_fixed_capacity_never_waits_and_has_the_shapes_of_its_bucket(fake, size, busiest):
    """Nothing that a CUDA graph cannot capture: every size is known before the step, whatever is routed."""
    fake.built()
    capacity, k, width = 2, 3, 16
    num_tokens_N = (0, *([busiest] * (size - 1))) if size > 1 else (busiest,)
    bucket = bucket_of(busiest)
    for rank in range(size):
        transport = FixedCapacityTransport(Collectives(rank, size, NoWork()), capacity)
        x_TD = torch.zeros(num_tokens_N[rank], width, dtype=torch.bfloat16, device=DEVICE)
        slots_TK = torch.zeros(num_tokens_N[rank], k, dtype=torch.int64, device=DEVICE)
        weights_TK = torch.zeros(num_tokens_N[rank], k, device=DEVICE)
        dispatched, handle = transport.dispatch(x_TD, slots_TK, num_tokens_N)()
        assert dispatched.x_RD.shape == (size * bucket * min(k, capacity), width)
        assert (dispatched.x_RD.device, dispatched.counts_L.shape) == (DEVICE, (capacity,))
        y_TD = transport.combine(dispatched.x_RD, weights_TK, handle)()
        assert (y_TD.shape, y_TD.dtype, y_TD.device) == (x_TD.shape, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("transport", [AllToAllTransport, GatherScatterTransport])
def test_transports_of_exact_sizes_wait_and_may_not_be_captured(fake, transport):
    fake.built()
    x_TD = torch.zeros(4, 16, dtype=torch.bfloat16, device=DEVICE)
    slots_TK = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(DataDependentOutputException):
        transport(Collectives(0, 2, NoWork()), 2).dispatch(x_TD, slots_TK, (4, 4))()


def test_the_net_catches_what_it_should(fake):
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    fake.built()
    for wait, error in (
        (lambda: ids.tolist(), DataDependentOutputException),
        (lambda: ids.max().item(), DataDependentOutputException),
        (lambda: torch.bincount(ids, minlength=4), DynamicOutputShapeException),
        (lambda: ids.nonzero(), DynamicOutputShapeException),
        (lambda: ids[ids > 0], DynamicOutputShapeException),
        (lambda: torch.tensor([1, 2], device=DEVICE), AssertionError),
        (lambda: ids + torch.ones(4, dtype=torch.int64), RuntimeError),
    ):
        with pytest.raises(error):
            wait()


def test_experts_with_rows_of_other_sizes_take_the_loop(fake):
    for width, model_width, kind in ((32, 64, StackedExperts), (36, 64, LoopedExperts), (32, 60, LoopedExperts)):
        shape = ExpertShape(width, model_width, torch.bfloat16, DEVICE)
        experts = make_experts(shape, [lambda *_: None] * 2)
        assert isinstance(experts, kind), (width, model_width)
    shape = ExpertShape(32, 64, torch.float32, DEVICE)
    assert isinstance(make_experts(shape, [lambda *_: None] * 2), LoopedExperts)


@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_stacked_experts_over_the_local_transport_equal_the_definition(num_tokens):
    """The CUDA path of an expert layer, with real numbers, on the CPU."""
    generator = torch.Generator().manual_seed(num_tokens)
    gate_up_L2ID = (0.2 * torch.randn(8, 64, 48, generator=generator)).bfloat16()
    down_LDI = (0.2 * torch.randn(8, 48, 32, generator=generator)).bfloat16()
    x_TD = torch.randn(num_tokens, 48, generator=generator).bfloat16()
    ids_TK = torch.rand(num_tokens, 8, generator=generator).topk(3, 1).indices
    dispatched, handle = LocalTransport(8).dispatch(x_TD, ids_TK, (num_tokens,))()
    assert torch.equal(dispatched.counts_L, torch.bincount(ids_TK.flatten(), minlength=8))
    shape = ExpertShape(32, 48, torch.bfloat16, torch.device("cpu"))
    y_RD = StackedExperts(shape, gate_up_L2ID, down_LDI).apply(dispatched.x_RD, dispatched.counts_L)
    want_RD = experts_reference(dispatched.x_RD, dispatched.counts_L, gate_up_L2ID, down_LDI)
    torch.testing.assert_close(y_RD, want_RD, rtol=0, atol=2**-6 * float(want_RD.abs().max()))
    assert handle.shape == (num_tokens, 3)
