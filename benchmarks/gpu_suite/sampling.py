"""The sampler on the device against the sampler on the CPU, for the same logits.

Uniforms must be the same bits: they are integers until one conversion, one addition and one product. Tokens must be
the same too; what could tell them apart is the last bit of ``exp`` and ``log``, which decides only between tokens whose
scores differ by as little.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt
from torch import Tensor

from moestro.protos.sequences import SampledToken, SamplingParams
from moestro.workers.sampling.noise import row_keys, uniform_at, uniform_vocab
from moestro.workers.sampling.sampler import SamplingRow, sample

PARAMS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 1.1, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_k and top_p": {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "penalties, greedy": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
    },
    "penalties, top_p": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "top_p": 0.95},
    "bias and min_tokens": {"logit_bias": {3: 5.0, 7: -100.0}, "min_tokens": 99, "eos_token_ids": (1, 2)},
}


def run(settings: Settings) -> Iterator[Check]:
    device = torch.device(settings.device)
    vocab, num_rows = (1003, 8) if settings.small else (151_936, 32)
    yield attempt("uniforms", lambda: check_uniforms(vocab, 64, settings.seed, device))
    for name in PARAMS:
        yield attempt(f"tokens: {name}", lambda name=name: check_tokens(name, vocab, num_rows, settings.seed, device))
    yield attempt("tokens: all of these in one batch", lambda: check_mixed(vocab, num_rows, settings.seed, device))
    yield attempt("tokens: ties and bad logits", lambda: check_ties_and_errors(vocab, device))
    yield attempt("logprobs", lambda: check_logprobs(vocab, settings.seed, device))


def check_uniforms(vocab: int, num_rows: int, seed: int, device: torch.device) -> Values:
    seeds = [seed, (1 << 64) - 1, 1 << 63, *range(seed + 1, seed + num_rows - 2)]
    keys_R = row_keys(seeds, [17 * row for row in range(num_rows)])
    generator = torch.Generator().manual_seed(seed)
    ids_RK = torch.randint(vocab, (num_rows, 200), generator=generator)
    for name, ours, cpu in (
        ("whole vocabulary", uniform_vocab(keys_R.to(device), vocab), uniform_vocab(keys_R, vocab)),
        ("looked up", uniform_at(keys_R.to(device), ids_RK.to(device)), uniform_at(keys_R, ids_RK)),
    ):
        different = int((ours.cpu().view(torch.int32) != cpu.view(torch.int32)).sum())
        if different:
            raise Unmet(f"{different} of {cpu.numel()} uniforms ({name}) have other bits")
    return {"headline": f"{num_rows} x {vocab} the same bits", "rows": num_rows, "vocab": vocab}


def check_tokens(name: str, vocab: int, num_rows: int, seed: int, device: torch.device) -> Values:
    return _compare(_logits(num_rows, vocab, seed), _rows([name], num_rows, vocab, seed), device)


def check_mixed(vocab: int, num_rows: int, seed: int, device: torch.device) -> Values:
    return _compare(_logits(num_rows, vocab, seed + 1), _rows(list(PARAMS), num_rows, vocab, seed), device)


def check_ties_and_errors(vocab: int, device: torch.device) -> Values:
    """Among equal logits the smallest id; NaN, +Inf and nothing finite end their own rows alone."""
    logits_RV = torch.zeros(6, vocab)
    logits_RV[0, 5], logits_RV[0, vocab - 1] = 2.0, 2.0
    logits_RV[2, 9] = float("nan")
    logits_RV[3, 9] = float("inf")
    logits_RV[4] = float("-inf")
    rows = [SamplingRow(SamplingParams(temperature=0.0), (1,), 1, 1)] * 5
    values = _compare(logits_RV, [*rows, SamplingRow(SamplingParams(top_k=2, seed=4), (1,), 1, 1)], device)
    tokens = [token.token_id for token in sample(logits_RV.to(device), rows + rows[:1])]
    if tokens != [5, 0, -1, -1, -1, 0]:
        raise Unmet(f"expected tokens 5, 0, three errors and 0, got {tokens}")
    return values


def check_logprobs(vocab: int, seed: int, device: torch.device) -> Values:
    """Ids alike; values within 1e-5, for a sum over the vocabulary is added in another order."""
    logits_RV = _logits(4, vocab, seed + 2)
    rows = [SamplingRow(SamplingParams(temperature=0.0, logprobs=k), (1,), 1, 1) for k in (0, 1, 5, 20)]
    worst = 0.0
    for ours, cpu in zip(sample(logits_RV.to(device), rows), sample(logits_RV, rows), strict=True):
        assert ours.logprobs is not None
        assert cpu.logprobs is not None
        if [i for i, _ in ours.logprobs.top] != [i for i, _ in cpu.logprobs.top]:
            raise Unmet(f"most likely tokens differ: {ours.logprobs.top} and {cpu.logprobs.top}")
        pairs = zip(ours.logprobs.top, cpu.logprobs.top, strict=True)
        worst = max([worst, abs(ours.logprobs.logprob - cpu.logprobs.logprob), *(abs(a[1] - b[1]) for a, b in pairs)])
    values: Values = {"headline": f"max error {worst:.1e}", "max_abs_error": worst, "bound": 1e-5}
    if not worst <= 1e-5:
        raise Unmet(f"log probabilities differ by {worst:.1e}", **values)
    return values


def _logits(num_rows: int, vocab: int, seed: int) -> Tensor:
    return 3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))


def _rows(names: list[str], num_rows: int, vocab: int, seed: int) -> list[SamplingRow]:
    generator = torch.Generator().manual_seed(seed + 99)
    rows = []
    for index in range(num_rows):
        ids = torch.randint(vocab, (40,), generator=generator).tolist()
        params = SamplingParams(**{"seed": seed + index, **PARAMS[names[index % len(names)]]})  # type: ignore[arg-type]
        rows.append(SamplingRow(params, tuple(ids), 25, 40))
    return rows


def _compare(logits_RV: Tensor, rows: list[SamplingRow], device: torch.device) -> Values:
    ours: list[SampledToken] = sample(logits_RV.to(device), rows)
    cpu = sample(logits_RV, rows)
    different = [
        f"row {index}: {a.token_id}, not {b.token_id}"
        for index, (a, b) in enumerate(zip(ours, cpu, strict=True))
        if a != b
    ]
    if different:
        raise Unmet(f"{len(different)} of {len(rows)} rows differ from the CPU's: {'; '.join(different[:4])}")
    return {"headline": f"{len(rows)} rows equal", "rows": len(rows)}
