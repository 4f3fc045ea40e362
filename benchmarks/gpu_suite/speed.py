"""Decode and prefill of a random Qwen3-30B-A3B made on the device, through the engine, against the measured roofs.

Contexts are real: every prompt is distinct, random and prefilled by the engine in chunks (so the first sequences of a
batch are some tokens ahead of the last). Rounds of decode steps follow with the batch unchanged. Greedy; requests never
end. The share of the roof is the shortest possible time (see ``costs.py``) over the measured one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from benchmarks.gpu_suite import roofs
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt, on_cuda_only
from benchmarks.gpu_suite.costs import step_cost
from benchmarks.gpu_suite.engines import make_engine, with_model
from benchmarks.gpu_suite.roofs import Roofs
from benchmarks.gpu_suite.timing import seconds, spread, synchronize
from benchmarks.gpu_suite.watching import ForwardClock, counting, kernels_of, timed_step

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.architectures import parse_config
from moestro.workers.device import configure_torch
from moestro.workers.engine import Engine
from moestro.workers.loading import random_model
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import MoeMlp

QWEN3_30B_A3B: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY: dict[str, object] = QWEN3_30B_A3B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. prompt + every step that follows stays below max_context."""

    shape: dict[str, object]
    batches: tuple[int, ...]
    prompt_tokens: int
    max_context: int
    max_num_tokens: int  # of one step
    warm_up_steps: int
    rounds: int
    steps_per_round: int
    split_steps: int
    prefills: tuple[tuple[int, int], ...]  # prompts in one step, tokens of each
    case_limit_s: float  # of one batch size


FULL = Plan(
    shape=QWEN3_30B_A3B,
    batches=(1, 8, 64, 256),
    prompt_tokens=896,
    max_context=1024,
    max_num_tokens=8192,
    warm_up_steps=8,
    rounds=5,
    steps_per_round=12,
    split_steps=8,
    prefills=((1, 1008), (8, 1008)),
    case_limit_s=75.0,
)
SMALL = Plan(
    shape=TINY,
    batches=(1, 3),
    prompt_tokens=20,
    max_context=64,
    max_num_tokens=48,
    warm_up_steps=2,
    rounds=3,
    steps_per_round=4,
    split_steps=2,
    prefills=((1, 32),),
    case_limit_s=20.0,
)
_PROFILED_STEPS = 2


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    plan, device = SMALL if settings.small else FULL, torch.device(settings.device)
    held: list[tuple[Roofs, Bench]] = []

    def make() -> Values:
        measured = roofs.measure(settings)  # first: its buffers are gone before the weights come
        if device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.perf_counter()
        decoder = random_model(parse_config(plan.shape), dtype=torch.bfloat16, device=device, seed=settings.seed)
        synchronize(device)
        made_s = time.perf_counter() - start
        weights = _allocated(device)
        engine = make_engine(
            decoder,
            max_num_sequences=max(plan.batches),
            max_num_tokens=plan.max_num_tokens,
            max_context=plan.max_context,
        )
        held.append((measured, Bench(plan, decoder, engine, settings.seed)))
        experts = {type(layer.mlp.bank.experts).__name__ for layer in decoder.layers if isinstance(layer.mlp, MoeMlp)}
        return {
            "headline": f"made in {made_s:.1f} s",
            "made_s": made_s,
            "weight_bytes": weights,
            "kv_bytes": engine.runner.cache.num_bytes,
            "experts": sorted(experts),
            "copy_bytes_per_s": measured.bytes_per_s,
            "matmul_flop_per_s": measured.flop_per_s,
            "shape": plan.shape,
        }

    made = attempt("random model", make)
    yield made
    if made.status != "passed":
        return
    measured, bench = held[0]
    for num_prompts, num_tokens in plan.prefills:
        yield attempt(
            f"prefill {num_prompts} x {num_tokens}",
            lambda num_prompts=num_prompts, num_tokens=num_tokens: bench.prefill(num_prompts, num_tokens, measured),
        )
        bench.clear()
    for batch in plan.batches:
        yield attempt(f"decode batch {batch}", lambda batch=batch: bench.decode(batch, measured))
        # The sequences are still running: the profiler takes their next steps.
        yield on_cuda_only(f"decode batch {batch}: kernels", settings, lambda batch=batch: bench.kernels(batch))
        bench.clear()


@dataclass(slots=True)
class Bench:
    """The engine under measurement and the sequences it runs."""

    plan: Plan
    decoder: Decoder
    engine: Engine
    seed: int
    lengths: dict[str, int] = field(default_factory=dict)  # known tokens by sequence
    num_added: int = 0
    decoding: int = 0  # sequences of the batch whose measurement succeeded and that still runs

    def prefill(self, num_prompts: int, num_tokens: int, measured: Roofs) -> Values:
        """Distinct prompts that fit one step, from adding them to their first tokens."""
        times = []
        for _ in range(self.plan.rounds + 1):  # the first round warms up
            self._add(num_prompts, num_tokens, max_tokens=1)
            times.append(seconds(self._step, self.device))
            if self.engine.has_work:
                raise Unmet(f"{num_prompts} prompts of {num_tokens} tokens did not fit one step")
        total = num_prompts * num_tokens
        cost = step_cost(self.decoder.config, num_tokens=total, context_tokens=0, logit_rows=num_prompts)
        rates = spread([total / t for t in times[1:]])
        share = cost.roof_s(measured.bytes_per_s, measured.flop_per_s) / (total / rates["median"])
        return {
            "headline": f"{rates['median']:,.0f} tok/s, {share:.1%} of the roof",
            "tokens_per_s": rates,
            "step_s": spread(times[1:]),
            "roof_share": share,
            "flop": cost.flop,
            "counted": "products with weights; attention's own arithmetic is not",
            "rounds": self.plan.rounds,
            "memory": self._memory(),
        }

    def decode(self, batch: int, measured: Roofs) -> Values:
        """Tokens per second of ``batch`` sequences at about ``max_context`` tokens each."""
        deadline = time.perf_counter() + self.plan.case_limit_s
        self._add(batch, self.plan.prompt_tokens, max_tokens=self.plan.max_context)
        start = time.perf_counter()
        while min(self.lengths.values()) <= self.plan.prompt_tokens:
            self._step()
            self._in_time(deadline, "prefilling")
        context_made_s = time.perf_counter() - start
        for _ in range(self.plan.warm_up_steps):
            self._step()
        first_context = sum(self.lengths.values())
        rounds = []
        for _ in range(self.plan.rounds):
            rounds.append(seconds(lambda: self._steps(batch, self.plan.steps_per_round), self.device))
            self._in_time(deadline, f"decoding; {len(rounds)} rounds took {sum(rounds):.1f} s")
        last_context = sum(self.lengths.values())
        mean_context = (first_context + last_context) / 2
        steps = self.plan.steps_per_round
        rates = spread([batch * steps / t for t in rounds])
        distinct = self._distinct()
        values: Values = {
            "tokens_per_s": rates,
            "step_s": spread([t / steps for t in rounds]),
            "rounds": len(rounds),
            "steps_per_round": steps,
            "context_per_sequence": {"first": first_context / batch, "last": last_context / batch},
            "context_made": {"how": "real prefill of distinct random prompts", "seconds": context_made_s},
            "split": self._split(),
            "distinct_experts_seen": distinct,
            "memory": self._memory(),
        }
        step_s = values["step_s"]["median"]
        for name, experts in (("uniform", None), ("seen", distinct["mean"])):
            cost = step_cost(
                self.decoder.config,
                num_tokens=batch,
                context_tokens=mean_context,
                logit_rows=batch,
                distinct_experts=experts,
            )
            roof_s = cost.roof_s(measured.bytes_per_s, measured.flop_per_s)
            values[f"roof_{name}"] = {
                "bytes": cost.num_bytes,
                "flop": cost.flop,
                "step_s": roof_s,
                "tokens_per_s": batch / roof_s,
                "share": roof_s / step_s,
            }
        self.decoding = batch
        share = values["roof_uniform"]["share"]
        return {"headline": f"{rates['median']:,.0f} tok/s, {share:.1%} of the roof"} | values

    def kernels(self, batch: int) -> Values:
        """Where the device's time goes in a decode step."""
        if self.decoding != batch:
            raise Unmet("no batch is running: its measurement failed before")
        return kernels_of(self._step, _PROFILED_STEPS)

    def clear(self) -> None:
        """Ends whatever runs."""
        for name in self.lengths:
            self.engine.cancel(name)
        while self.engine.has_work:
            self.engine.step(time.monotonic)
        self.lengths.clear()
        self.decoding = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def device(self) -> torch.device:
        return self.engine.runner.device

    def _add(self, count: int, num_tokens: int, max_tokens: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_added)
        prompts = torch.randint(self.decoder.config.vocab_size, (count, num_tokens), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for prompt in prompts:
            name = str(self.num_added)
            refusal = self.engine.add(SequenceRequest(name, tuple(prompt), sampling), time.monotonic())
            if refusal is not None:
                raise Unmet(refusal)
            self.lengths[name] = num_tokens
            self.num_added += 1

    def _step(self) -> None:
        for delta in self.engine.step(time.monotonic):
            if delta.error:
                raise Unmet(f"sequence {delta.sequence_id}: {delta.error}")
            if delta.finish_reason is not None:
                del self.lengths[delta.sequence_id]
            else:
                self.lengths[delta.sequence_id] += len(delta.token_ids)

    def _steps(self, batch: int, count: int) -> None:
        before = sum(self.lengths.values())
        for _ in range(count):
            self._step()
        made = sum(self.lengths.values()) - before
        if made != batch * count:
            raise Unmet(f"{count} steps of {batch} sequences made {made} tokens")

    def _in_time(self, deadline: float, doing: str) -> None:
        if time.perf_counter() > deadline:
            raise Unmet(f"past {self.plan.case_limit_s:.0f} s while {doing}")

    def _split(self) -> Values:
        """Medians over some steps, apart from the timed rounds."""
        clock = ForwardClock(self.decoder)
        watched = with_model(self.engine, clock)
        splits = [timed_step(watched, clock) for _ in range(self.plan.split_steps)]
        return {key: spread([split[key] for split in splits])["median"] for key in splits[0]}

    def _distinct(self) -> dict[str, float]:
        """Distinct experts a layer in one further step: how far routing is from uniform."""
        decoder, distinct = counting(self.decoder)
        with_model(self.engine, decoder).step(time.monotonic)
        counts = torch.stack(distinct).tolist()
        return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts)}

    def _memory(self) -> Values:
        if self.device.type != "cuda":
            return {}
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None
