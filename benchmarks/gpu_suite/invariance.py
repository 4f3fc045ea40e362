"""The bits of a request's logits, alone and in company, on the device.

Each prompt is run by itself, whole; then all of them together, cut into chunks by a small budget of tokens a step; then
in another order; then with decodes captured as CUDA graphs; then with every expert in another slot. Every position's
logits must be the same bits, in bf16 and in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt
from benchmarks.gpu_suite.engines import Transcript, follow, make_engine
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.kernels.cpu.experts import CpuExperts
from moestro.kernels.grouped_experts import LoopedExperts, StackedExperts
from moestro.router.assign import lay_out
from moestro.router.placement import Placement
from moestro.workers.captured.setup import why_not_captured
from moestro.workers.device import configure_torch
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder

MODELS = ("qwen3_moe", "mixtral", "qwen2_moe", "dots1")
LENGTHS = (1, 5, 17, 40, 64, 150)


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    for name in MODELS[:2] if settings.small else MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            yield attempt(
                f"{name} {str(dtype).removeprefix('torch.')}",
                lambda name=name, dtype=dtype: check(name, dtype, settings),
            )


def check(name: str, dtype: torch.dtype, settings: Settings) -> Values:
    num_output = 4 if settings.small else 64
    with tempfile.TemporaryDirectory() as folder:
        save_model(make_model(name, settings.seed), Path(folder))
        decoder = load_model(folder, dtype=dtype, device=settings.device)
    prompts = [random_ids(length, seed=settings.seed + length) for length in LENGTHS]
    alone = [_answers(decoder, [prompt], num_output, max_num_tokens=256)[0] for prompt in prompts]
    for what, order, budget in (("in chunks of a crowd", 1, 13), ("in the other order", -1, 256)):
        found = _answers(decoder, prompts[::order], num_output, budget)[::order]
        _compare(what, alone, found)
    checked = 2
    reason = "" if settings.device == "cpu" else why_not_captured(decoder)
    if not reason:
        # With graphs also those for which other rows are padding: six sequences in a graph of eight.
        _compare("captured", alone, _answers(decoder, prompts, num_output, 256, graphs=8))
        checked += 1
    _shuffle_experts(decoder, settings.seed)
    _compare("with experts in other slots", alone, _answers(decoder, prompts, num_output, 256, 0 if reason else 8))
    positions = sum(len(transcript.ids) - 1 for transcript in alone)
    return {
        "headline": f"{positions} positions the same bits, {checked + 1} times" + (", not captured" if reason else ""),
        "positions": positions,
        "not_captured": reason,
    }


def _shuffle_experts(decoder: Decoder, seed: int) -> None:
    """Puts every expert of every layer in another slot, as a rebalancer would."""
    for layer, bank in decoder.banks.items():
        old = bank.layout.placement
        generator = torch.Generator().manual_seed(seed + layer)
        order = torch.randperm(old.num_experts, generator=generator).tolist()
        new = Placement(old.num_experts, (tuple(order),))
        bank.switch_(lay_out(new, 0, bank.rows_L.device), moved(bank.experts, old, new))


def moved(experts: Any, old: Placement, new: Placement) -> dict[int, Any]:
    """What ``replace_`` takes, by slot of ``new``, copied from the slots of ``old``."""
    slot_of = {expert: slot for slot, expert in enumerate(old.slots[0])}
    return {slot: held(experts, slot_of[expert]) for slot, expert in enumerate(new.slots[0])}


def held(experts: Any, slot: int) -> Any:
    """A copy of what a slot holds, as ``stage`` would have made it."""
    if isinstance(experts, LoopedExperts):
        return experts.expert_L[slot]
    if isinstance(experts, CpuExperts):
        return experts.packed_LP[slot].clone()
    if isinstance(experts, StackedExperts):
        return experts.gate_up_L2ID[slot].clone(), experts.down_LDI[slot].clone()
    copies = experts.gate_up.empty_one(), experts.down.empty_one()
    copies[0].copy_(experts.gate_up[slot])
    copies[1].copy_(experts.down[slot])
    return copies


def _answers(
    decoder: Decoder, prompts: list[list[int]], num_output: int, max_num_tokens: int, graphs: int = 0
) -> list[Transcript]:
    engine = make_engine(
        decoder,
        max_num_sequences=len(prompts),
        max_num_tokens=max_num_tokens,
        max_context=max(LENGTHS) + num_output,
        block_size=8,
        graphs=graphs,
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
