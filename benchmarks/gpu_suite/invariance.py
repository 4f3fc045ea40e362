"""The bits of a request's logits, alone and in company, on the device.

Each prompt is run by itself, whole; then all of them together, cut into chunks by a small budget of tokens a step; then
in another order. Every position's logits must be the same bits, in bf16 and in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt
from benchmarks.gpu_suite.engines import Transcript, follow, make_engine
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.workers.device import configure_torch
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder

MODELS = ("qwen3_moe", "mixtral", "qwen2_moe", "dots1")
LENGTHS = (1, 5, 17, 40, 64, 150)


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    for name in MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            yield attempt(
                f"{name} {str(dtype).removeprefix('torch.')}",
                lambda name=name, dtype=dtype: check(name, dtype, settings),
            )


def check(name: str, dtype: torch.dtype, settings: Settings) -> Values:
    num_output = 8 if settings.small else 64
    with tempfile.TemporaryDirectory() as folder:
        save_model(make_model(name, settings.seed), Path(folder))
        decoder = load_model(folder, dtype=dtype, device=settings.device)
    prompts = [random_ids(length, seed=settings.seed + length) for length in LENGTHS]
    alone = [_answers(decoder, [prompt], num_output, max_num_tokens=256)[0] for prompt in prompts]
    for what, order, budget in (("in chunks of a crowd", 1, 13), ("in the other order", -1, 256)):
        found = _answers(decoder, prompts[::order], num_output, budget)[::order]
        _compare(what, alone, found)
    positions = sum(len(transcript.ids) - 1 for transcript in alone)
    return {"headline": f"{positions} positions the same bits, twice", "positions": positions}


def _answers(decoder: Decoder, prompts: list[list[int]], num_output: int, max_num_tokens: int) -> list[Transcript]:
    engine = make_engine(
        decoder,
        max_num_sequences=len(prompts),
        max_num_tokens=max_num_tokens,
        max_context=max(LENGTHS) + num_output,
        block_size=8,
    )
    return follow(engine, prompts, num_output)


def _compare(what: str, alone: list[Transcript], found: list[Transcript]) -> None:
    for length, one, other in zip(LENGTHS, alone, found, strict=True):
        want_TV, got_TV = one.logits_TV(), other.logits_TV()
        if one.ids != other.ids or not torch.equal(want_TV, got_TV):
            same = min(len(want_TV), len(got_TV))
            differs_T = (want_TV[:same] != got_TV[:same]).any(1)
            first = int(differs_T.int().argmax()) if bool(differs_T.any()) else same
            raise Unmet(f"prompt of {length} {what}: position {first} has other bits, of {len(want_TV)}")
