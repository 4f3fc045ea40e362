"""The engine under measurement: prefill, decode, where a step's time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from benchmarks.gpu_suite.checks import Unmet, Values
from benchmarks.gpu_suite.costs import step_cost
from benchmarks.gpu_suite.energy import measured as energy_of
from benchmarks.gpu_suite.engines import capturing, eager_of, with_model
from benchmarks.gpu_suite.roofs import Roofs
from benchmarks.gpu_suite.shapes import Shape
from benchmarks.gpu_suite.skew import skewed
from benchmarks.gpu_suite.timing import seconds, spread
from benchmarks.gpu_suite.watching import counting, kernels_of, timed_step

from moestro.protos.sequences import SamplingParams, SequenceRequest
from moestro.workers.engine import Engine
from moestro.workers.model.decoder import Decoder

_PROFILED_STEPS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. prompt + every step that follows stays below max_context."""

    shape: Shape
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
    graphs: int = 0  # sequences up to which a step is captured
    skewed: tuple[int, ...] = ()  # batches that are measured once more with skewed routing
    mixed: tuple[int, int, float] | None = None  # sequences at a time, tokens in and out, seconds


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
        goal = self.plan.shape.goals.get(0)
        share = cost.roof_s(measured.bytes_per_s, measured.flop_per_s) / (total / rates["median"])
        return {
            "headline": f"{rates['median']:,.0f} tok/s, {_of_goal(share, goal)}",
            "tokens_per_s": rates,
            "step_s": spread(times[1:]),
            "roof_share": share,
            "goal": goal,
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
        rounds: list[float] = []
        with energy_of(self.device) as energy:
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
            "energy": energy.per(batch * steps * len(rounds)),
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
        share, goal = values["roof_uniform"]["share"], self.plan.shape.goals.get(batch)
        return {"headline": f"{rates['median']:,.0f} tok/s, {_of_goal(share, goal)}", "goal": goal} | values

    def skew(self) -> Values:
        """From now on experts are as popular as the words of a language: the n-th has 1 / n of the first's odds, in an
        order of each layer's own. The same weights; graphs are captured anew."""
        self.decoder = skewed(self.decoder, self.seed)
        self.engine = capturing(with_model(self.engine, self.decoder), self.decoder, self.plan.graphs)
        return {"headline": "odds of the n-th expert are 1 / n of the first's"}

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
        return eager_of(self.engine).device

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
        splits = [timed_step(self.engine) for _ in range(self.plan.split_steps)]
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


def _of_goal(share: float, goal: float | None) -> str:
    wanted = "" if goal is None else f" (goal {goal:.0%}: {'reached' if share >= goal else 'missed'})"
    return f"{share:.1%} of the roof{wanted}"
