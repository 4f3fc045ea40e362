"""What the C++ kernels do token by token, norm and gate, against the definitions and against themselves in company.

The cases of ``test_gate`` run on this gate as well.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.kernels.cpu.backend import make_cpu_backend
from moestro.kernels.cpu.build import unavailable_reason
from moestro.kernels.gate import GateSpec, GroupSpec, Score, route
from moestro.kernels.rms_norm import rms_norm_reference

REASON = unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def backend():
    return make_cpu_backend()


def bits(x):
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def norm_inputs(tokens, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x_TM, delta_TM = (3 * torch.randn(2, tokens, width, generator=generator)).bfloat16()
    return x_TM, delta_TM, (torch.rand(width, generator=generator) + 0.5).bfloat16()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 300),
    added=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_stream_and_its_norm(backend, tokens, width, added, seed):
    x_TM, delta_TM, weight_M = norm_inputs(tokens, width, seed)
    want_TM = x_TM + delta_TM if added else x_TM.clone()
    stream_TM, h_TM = backend.add_rms_norm(x_TM, delta_TM if added else None, weight_M, 1e-6)
    assert torch.equal(stream_TM, want_TM), seed
    want_TM = rms_norm_reference(want_TM.double(), weight_M, 1e-6)
    torch.testing.assert_close(h_TM.double(), want_TM, rtol=2**-8, atol=1e-9, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("width", [24, 512, 1000])
def test_the_norm_of_a_row_does_not_depend_on_the_others(backend, width):
    inputs = norm_inputs(200, width, seed=width)
    wanted = None
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        x_TM, delta_TM, weight_M = (x.clone() for x in inputs)
        stream_TM, h_TM = backend.add_rms_norm(x_TM, delta_TM, weight_M, 1e-6)
        torch.set_num_threads(1)
        wanted = wanted or (bits(stream_TM), bits(h_TM))
        assert torch.equal(bits(stream_TM), wanted[0])
        assert torch.equal(bits(h_TM), wanted[1])
    for start, stop in [(0, 1), (1, 4), (199, 200), (13, 150)]:
        x_TM, delta_TM, weight_M = (x.clone() for x in inputs)
        got = backend.add_rms_norm(x_TM[start:stop].clone(), delta_TM[start:stop].clone(), weight_M, 1e-6)
        assert torch.equal(bits(got[0]), wanted[0][start:stop])
        assert torch.equal(bits(got[1]), wanted[1][start:stop])


def test_a_nan_stays_in_its_row(backend):
    x_TM, delta_TM, weight_M = norm_inputs(5, 64, seed=1)
    want = backend.add_rms_norm(x_TM.clone(), delta_TM, weight_M, 1e-6)
    x_TM[2, 7] = float("nan")
    got = backend.add_rms_norm(x_TM, delta_TM, weight_M, 1e-6)
    for other in (0, 1, 3, 4):
        assert torch.equal(got[0][other], want[0][other])
        assert torch.equal(got[1][other], want[1][other])
    assert got[1][2].isnan().all()


def test_what_does_not_fit_is_refused(backend):
    x_TM, delta_TM, weight_M = norm_inputs(3, 64, seed=1)
    with pytest.raises(ValueError, match="one shape"):
        backend.add_rms_norm(x_TM, delta_TM[:2], weight_M, 1e-6)
    with pytest.raises(ValueError, match="rows of 64 numbers"):
        backend.add_rms_norm(x_TM, delta_TM, weight_M[:32], 1e-6)
    with pytest.raises(ValueError, match="do not hold 9 experts"):
        backend.route(torch.zeros(1, 16), None, GateSpec(16, 9, renormalize=True, groups=GroupSpec(4, 2)))


@st.composite
def gate_specs(draw):
    size, num_groups = draw(st.integers(2, 20)), draw(st.integers(1, 8))
    top_groups = draw(st.integers(1, num_groups))
    groups = GroupSpec(num_groups, top_groups) if draw(st.booleans()) else None
    experts = size * num_groups
    most = size * top_groups if groups else experts
    return GateSpec(
        experts,
        draw(st.integers(1, min(most, 12))),
        renormalize=draw(st.booleans()),
        score=draw(st.sampled_from(Score)),
        has_bias=draw(st.booleans()),
        groups=groups,
        scaling=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=150, deadline=None)
@given(
    spec=gate_specs(),
    tokens=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_gate_chooses_as_the_plain_one_does(backend, spec, tokens, dtype, seed):
    """Scores of the two differ in the last bits at most: in bf16 many logits are equal, and the rest far apart."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, spec.num_experts, generator=generator).to(dtype)
    # Coarse, so that no two sums of a score and a correction differ by less than the error of a score.
    bias_E = torch.randint(-3, 4, (spec.num_experts,), generator=generator).float() if spec.has_bias else None
    got_ids_TK, got_TK = backend.route(logits_TE, bias_E, spec)
    want_ids_TK, want_TK = route(logits_TE, bias_E, spec)
    assert torch.equal(got_ids_TK, want_ids_TK), seed
    torch.testing.assert_close(got_TK, want_TK, rtol=1e-6, atol=0, msg=lambda m: f"seed {seed}: {m}")
