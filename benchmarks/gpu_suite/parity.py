"""Every architecture on the device against transformers' own classes on the same device, through the engine.

fp32: logits of every position, prompt and output, within ``TOLERANCE`` of the oracle's, and every greedy token the
oracle's own choice after the same prefix, which by induction makes the outputs equal. bf16: no two implementations
agree bit for bit (a gate may pick another expert for a rounding), so the mean distance to the fp32 oracle may be at
most ``BF16_BOUND`` times that of transformers' own bf16 run.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt, on_cuda_only
from benchmarks.gpu_suite.engines import Transcript, follow, make_engine, with_model
from benchmarks.small_models import MODELS, make_model, random_ids, save_model
from torch import Tensor

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.architectures import ARCHITECTURES
from moestro.workers.batch import Batch
from moestro.workers.device import configure_torch
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder
from moestro.workers.runner import Model

TOLERANCE = 2e-4
BF16_BOUND = 1.25
FULL_TOKENS, SMALL_TOKENS = 128, 12


@dataclass(frozen=True, slots=True)
class Scenario:
    """Prompts that start together, and the budget of a step that decides how they are cut."""

    name: str
    prompt_lengths: tuple[int, ...]
    max_num_tokens: int


SCENARIOS = (
    Scenario("single", (45,), 64),  # one prompt in one step
    Scenario("batch", (1, 5, 30, 70, 140), 24),  # chunks of prompts beside decodes
)


def run(settings: Settings) -> Iterator[Check]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    configure_torch(settings.device)
    torch.set_float32_matmul_precision("highest")  # TF32 off
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(settings.device)
    num_output = SMALL_TOKENS if settings.small else FULL_TOKENS
    yield attempt("every architecture has a small model", _covered)
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            saved = attempt(f"{name}: checkpoint", lambda name=name, path=path: _save(name, path, settings.seed))
            if saved.status != "passed":
                yield saved
                continue
            for scenario in SCENARIOS:
                yield attempt(
                    f"{name} fp32 {scenario.name}",
                    lambda path=path, scenario=scenario: check_fp32(path, scenario, num_output, device),
                )
            yield attempt(f"{name} bf16", lambda path=path: check_bf16(path, num_output, device))
            if name == "qwen3_moe":
                yield on_cuda_only(
                    "qwen3_moe bf16: waits for the device", settings, lambda path=path: check_waits(path, device)
                )


def _covered() -> Values:
    families = {f"{family}ForCausalLM" for family, _ in MODELS.values()}
    if families != set(ARCHITECTURES):
        raise Unmet(f"small models and architectures differ in {sorted(families ^ set(ARCHITECTURES))}")
    return {"architectures": sorted(families)}


def _save(name: str, folder: Path, seed: int) -> Values:
    save_model(make_model(name, seed), folder)
    return {}


def check_fp32(folder: Path, scenario: Scenario, num_output: int, device: torch.device) -> Values:
    """Raises Unmet when a logit or a token is off."""
    decoder = load_model(folder, dtype=torch.float32, device=device)
    oracle = load_oracle(folder, torch.float32, device)
    worst, positions, differences = 0.0, 0, []
    for number, transcript in enumerate(_follow(decoder, scenario, num_output)):
        want_TV = oracle_logits(oracle, transcript.ids[:-1])
        got_TV = transcript.logits_TV()
        worst = max(worst, float((got_TV - want_TV).abs().max()))
        positions += len(want_TV)
        differences += [f"prompt {number} {text}" for text in different_tokens(transcript, want_TV)]
    values: Values = {
        "headline": f"max error {worst:.1e}",
        "max_abs_error": worst,
        "bound": TOLERANCE,
        "positions": positions,
        "greedy_tokens": num_output * len(scenario.prompt_lengths),
        "different_tokens": differences[:8],
    }
    if differences:
        raise Unmet(f"{len(differences)} greedy tokens are not the oracle's", **values)
    if not worst <= TOLERANCE:
        raise Unmet(f"max error {worst:.2e} is above {TOLERANCE:.0e}", **values)
    return values


def check_bf16(folder: Path, num_output: int, device: torch.device) -> Values:
    """Raises Unmet when ours is further from fp32 than the bound allows."""
    decoder = load_model(folder, dtype=torch.bfloat16, device=device)
    oracle = load_oracle(folder, torch.float32, device)
    theirs = load_oracle(folder, torch.bfloat16, device)
    our_error = their_error = 0.0
    agree = positions = 0
    for scenario in SCENARIOS:
        for transcript in _follow(decoder, scenario, num_output):
            want_TV, got_TV = oracle_logits(oracle, transcript.ids[:-1]), transcript.logits_TV()
            our_error += float((got_TV - want_TV).abs().mean(1).sum())
            their_error += float((oracle_logits(theirs, transcript.ids[:-1]) - want_TV).abs().mean(1).sum())
            agree += int((got_TV.argmax(1) == want_TV.argmax(1)).sum())
            positions += len(want_TV)
    ratio = our_error / their_error
    values = {
        "headline": f"mean error {ratio:.2f} x transformers'",
        "mean_abs_error": our_error / positions,
        "transformers_mean_abs_error": their_error / positions,
        "ratio": ratio,
        "bound": BF16_BOUND,
        "positions": positions,
        "same_argmax_as_fp32": agree / positions,
    }
    if not ratio <= BF16_BOUND:
        raise Unmet(f"mean error is {ratio:.2f} times transformers', above {BF16_BOUND}", **values)
    return values


def check_waits(folder: Path, device: torch.device) -> Values:
    """How often the host waits: never within a forward pass, once in a greedy step (for its tokens)."""
    decoder = load_model(folder, dtype=torch.bfloat16, device=device)
    engine = make_engine(decoder, max_num_sequences=4, max_num_tokens=64, max_context=128)
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    for index in range(4):
        engine.add(SequenceRequest(str(index), tuple(random_ids(7 + index, index)), sampling), 0.0)
    for _ in range(4):  # buffers exist and kernels are loaded from here on
        _step(engine)
    forward, step = _count_waits(engine)
    values = {"headline": f"{forward} in a forward pass, {step} in a step", "forward": forward, "step": step}
    if forward or step > 1:
        raise Unmet("the host waits for the device more often than for the tokens of a step", **values)
    return values


def _step(engine: Engine) -> None:
    engine.step(lambda: 0.0)


@dataclass(slots=True)
class _WaitCounter:
    """A model that counts the warnings of torch's synchronisation debug mode within its forward pass."""

    model: Model
    seen: list[warnings.WarningMessage]
    forward_waits: int = 0

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        before = _waits(self.seen)
        logits_RV = self.model.forward(batch, cache)
        self.forward_waits = _waits(self.seen) - before
        return logits_RV


def _waits(seen: list[warnings.WarningMessage]) -> int:
    return sum("called a synchronizing" in str(one.message) for one in seen)


def _count_waits(engine: Engine) -> tuple[int, int]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            counter = _WaitCounter(engine.runner.model, seen)
            _step(with_model(engine, counter))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return counter.forward_waits, _waits(seen)


def _follow(decoder: Decoder, scenario: Scenario, num_output: int) -> list[Transcript]:
    prompts = [random_ids(length, seed=50 + index) for index, length in enumerate(scenario.prompt_lengths)]
    max_context = max(scenario.prompt_lengths) + num_output
    engine = make_engine(
        decoder,
        max_num_sequences=len(prompts),
        max_num_tokens=scenario.max_num_tokens,
        max_context=max_context,
        block_size=8,
    )
    return follow(engine, prompts, num_output)


def load_oracle(folder: Path, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    """transformers' own class; its experts one by one, so that it does not depend on a grouped product either."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.to(device).eval()


@torch.no_grad()
def oracle_logits(model: transformers.PreTrainedModel, ids: list[int]) -> Tensor:
    """logits_TV of all positions at once, fp32, on the CPU."""
    return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()


def different_tokens(transcript: Transcript, want_TV: Tensor) -> list[str]:
    """Output tokens that are not the oracle's argmax, with how much the oracle prefers its own."""
    found = []
    for position in range(transcript.num_prompt - 1, len(transcript.ids) - 1):
        token, row_V = transcript.ids[position + 1], want_TV[position]
        best = int(row_V.argmax())
        if token != best:
            gap = float(row_V[best] - row_V[token])
            found.append(f"position {position + 1}: {token}, not {best}; the oracle's logits differ by {gap:.1e}")
    return found
