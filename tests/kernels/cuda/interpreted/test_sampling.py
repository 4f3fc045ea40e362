"""Tokens and log probabilities against the sampler that every request can fall back on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moestro.kernels.cuda import most_likely as most_likely_module
from moestro.kernels.cuda import sampling
from moestro.kernels.cuda.most_likely import most_likely
from moestro.kernels.cuda.sampling import gumbel_of_chunk, sample_rows
from moestro.protos.sequences import SamplingParams
from moestro.workers.sampling.noise import gumbel_, row_keys, uniform_vocab
from moestro.workers.sampling.ordering import ranked
from moestro.workers.sampling.sampler import SamplingRow, sample


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """So that a small vocabulary has several."""
    monkeypatch.setattr(sampling, "_CHUNK", 64)
    monkeypatch.setattr(most_likely_module, "_CHUNK", 64)


def draw(logits_RV, temperatures, seeds, positions):
    return sample_rows(logits_RV, torch.tensor(temperatures), row_keys(seeds, positions))


def expected(logits_RV, temperatures, seeds, positions, k=0):
    rows = [
        SamplingRow(SamplingParams(temperature=t, seed=seed, logprobs=k), (), 0, position)
        for t, seed, position in zip(temperatures, seeds, positions, strict=True)
    ]
    return sample(logits_RV.float(), rows)


@triton.jit
def noise_kernel(key_ptr, out_ptr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    noise_B = gumbel_of_chunk(tl.load(key_ptr), chunk * BLOCK, BLOCK)
    tl.store(out_ptr + chunk * BLOCK + tl.arange(0, BLOCK), noise_B)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11, 2**64 - 1])
def test_noise(seed):
    """Equal uniforms would differ in many places if one bit of the hash did; logarithms may in the last place."""
    key_1 = row_keys([seed], [17])
    got = torch.empty(4096)
    noise_kernel[(4,)](key_1, got, BLOCK=1024)
    uniform = uniform_vocab(key_1, 4096)[0]
    torch.testing.assert_close(got, gumbel_(uniform.clone()), rtol=1e-6, atol=2e-7)
    exact = -torch.log(-torch.log1p(-uniform.double()))
    assert (got.double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 64, 65, 257])
def test_tokens_are_those_of_the_sampler(vocabulary, dtype):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        temperatures = [0.0, 1.0, 0.3, 2.0, 0.0, 1e-40, 100.0]
        num_rows = len(temperatures)
        logits_RV = (4 * torch.randn(num_rows, vocabulary, generator=generator)).to(dtype)
        seeds, positions = [seed * 977 + r for r in range(num_rows)], list(range(5, 5 + num_rows))
        code_R, logprob_R, _ = draw(logits_RV, temperatures, seeds, positions)
        want = expected(logits_RV, temperatures, seeds, positions)
        assert code_R.tolist() == [token.token_id for token in want], seed
        logprobs = torch.log_softmax(logits_RV.double(), 1).gather(1, code_R[:, None])[:, 0]
        torch.testing.assert_close(logprob_R.double(), logprobs, rtol=1e-6, atol=2e-6)


def test_of_equal_logits_the_smallest_id():
    logits_RV = torch.zeros(3, 200)
    logits_RV[0, [70, 130, 190]] = 5
    logits_RV[1] = -0.0
    logits_RV[1, 80] = 0.0
    logits_RV[2, 199] = 1e-3
    assert draw(logits_RV, [0.0] * 3, [0] * 3, [0] * 3)[0].tolist() == [70, 0, 199]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_is_wrong_with_a_row(temperature):
    logits_RV = torch.randn(6, 150, generator=torch.Generator().manual_seed(1))
    logits_RV[1, 100] = float("nan")
    logits_RV[2, 3] = float("inf")
    logits_RV[3] = float("-inf")
    logits_RV[4, :] = float("inf")
    logits_RV[4, 149] = float("nan")
    logits_RV[5, :149] = float("-inf")
    code_R, logprob_R, _ = draw(logits_RV, [temperature] * 6, range(6), range(6))
    assert code_R[1:].tolist() == [-1, -2, -3, -1, 149]
    assert [token.error is None for token in expected(logits_RV, [temperature] * 6, range(6), range(6))] == [
        code >= 0 for code in code_R.tolist()
    ]
    assert code_R[0] >= 0
    assert logprob_R[[0, 5]].isfinite().all()
    assert logprob_R[5] == 0


def test_bits_do_not_depend_on_company():
    logits_RV = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    code_R, logprob_R, _ = draw(logits_RV, [0.0, 1.0, 0.5, 2.0], range(4), range(4))
    for r, temperature in enumerate([0.0, 1.0, 0.5, 2.0]):
        code, logprob, _ = draw(logits_RV[r : r + 1], [temperature], [r], [r])
        assert code[0] == code_R[r]
        assert torch.equal(logprob[0], logprob_R[r])


@pytest.mark.parametrize(("vocabulary", "k"), [(1, 5), (70, 3), (300, 20), (64, 64)])
def test_the_most_likely(vocabulary, k):
    generator = torch.Generator().manual_seed(vocabulary)
    logits_RV = torch.randint(-9, 9, (3, vocabulary), generator=generator) / 4  # many equal ones
    logits_RV[logits_RV == 0] *= -1
    _, _, normaliser_R2 = draw(logits_RV, [0.0] * 3, [0] * 3, [0] * 3)
    id_RK, logprob_RK = most_likely(logits_RV, normaliser_R2, k)
    assert torch.equal(id_RK, ranked(logits_RV, min(k, vocabulary))[1])
    want = torch.log_softmax(logits_RV.double(), 1).gather(1, id_RK)
    torch.testing.assert_close(logprob_RK.double(), want, rtol=1e-6, atol=2e-6)
