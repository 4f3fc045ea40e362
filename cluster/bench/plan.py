"""A benchmark decided in full, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from moestro.cluster.bench import options
from moestro.cluster.bench.arrivals import MOST_REQUESTS, Burst, ClosedLoop, Extent, Load, OpenLoop, Replay
from moestro.cluster.bench.lengths import Lengths, parse_lengths
from moestro.cluster.bench.slo import Slo
from moestro.cluster.bench.target import TargetInfo
from moestro.cluster.bench.trace import Trace
from moestro.cluster.bench.workload import LengthSource, RandomPrompts, TextPrompts, Workload
from moestro.protos.errors import ConfigError

Setting = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Plan:
    """``input`` None: prompts are ``lines`` of text. ``sources`` names the files that were read, by content, for the
    report."""

    load: Load
    extent: Extent
    output: LengthSource
    input: LengthSource | None = None
    lines: tuple[str, ...] = ()
    warmup: int = 0  # requests sent and awaited before each round, and left out of every number
    rounds: int = 1
    seed: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    slo: Slo | None = None
    sources: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        options.within("--warmup", self.warmup, 0, MOST_REQUESTS)
        options.within("--rounds", self.rounds, 1, 1000)
        options.within("--seed", self.seed, 0, 2**63 - 1)
        options.within("--temperature", self.temperature, 0, 2)
        options.positive("--timeout", self.timeout_s)
        if self.input is None and not self.lines:
            raise ConfigError("--prompts must hold at least one line of text, got none")

    def settings(self) -> dict[str, Setting]:
        """What a reader needs to repeat the run, as plain values."""
        return {
            "load": str(self.load),
            "requests": self.extent.num_requests,
            "duration_s": self.extent.duration_s,
            "input": "lines of text" if self.input is None else _describe(self.input),
            "output": _describe(self.output),
            "ignore_eos": self.ignore_eos,
            "temperature": self.temperature,
            "warmup": self.warmup,
            "rounds": self.rounds,
            "seed": self.seed,
            "slo": None if self.slo is None else str(self.slo),
            "timeout_s": self.timeout_s,
            "files": ", ".join(self.sources) or None,
        }

    def workload(self, seed: int, info: TargetInfo) -> Workload:
        """The requests of a round against this target. Raises ConfigError when it does not say its vocabulary and
        prompts are random."""
        if self.input is None:
            return Workload(seed, TextPrompts(self.lines), self.output, self.ignore_eos, self.temperature)
        if info.vocab_size is None:
            raise ConfigError("--prompts must be given: this server does not say its vocabulary for random prompts")
        return Workload(
            seed, RandomPrompts(self.input, info.vocab_size), self.output, self.ignore_eos, self.temperature
        )


def choose_load(rate: float | None, cv: float, concurrency: int | None, trace: Trace | None) -> Load:
    """The load that the options mean: a rate (``inf``: all at once), a concurrency, the trace's own times, or else
    4 at a time. Raises ConfigError when they contradict each other."""
    if rate is not None and concurrency is not None:
        raise ConfigError(f"--rate and --concurrency exclude each other, got {rate:g} and {concurrency}")
    if cv != 1.0 and rate is None:
        raise ConfigError(f"--cv needs --rate, got {cv:g} alone")
    if rate is not None:
        return Burst() if rate == float("inf") else OpenLoop(rate, cv)
    if concurrency is None and trace is not None and trace.arrivals_s is not None:
        return Replay(trace.arrivals_s)
    return ClosedLoop(4 if concurrency is None else concurrency)


def choose_lengths(
    input_text: str | None, output_text: str | None, trace: Trace | None, has_lines: bool
) -> tuple[LengthSource | None, LengthSource]:
    """Prompt lengths (None: prompts are lines of text) and output lengths that the options mean; 128 and 64 tokens
    when they do not say. Raises ConfigError when two of them say the same thing."""
    if input_text is not None and (has_lines or trace is not None):
        raise ConfigError(
            f"--input and {'--prompts' if has_lines else '--trace'} exclude each other, got {input_text!r}"
        )
    if output_text is not None and trace is not None:
        raise ConfigError(f"--output and --trace exclude each other, got {output_text!r}")
    if trace is not None:
        return None if has_lines else trace.input_tokens, trace.output_tokens
    output = parse_lengths("--output", output_text or "64")
    return None if has_lines else parse_lengths("--input", input_text or "128"), output


def choose_extent(num_requests: int | None, duration_s: float | None, load: Load) -> Extent:
    """How much to send; 64 requests, or the whole of a replayed trace, when the options do not say."""
    if num_requests is None and duration_s is None:
        return Extent(len(load.times_s) if isinstance(load, Replay) else 64)
    if isinstance(load, Burst) and num_requests is None:
        raise ConfigError("--rate inf needs --requests: a burst has no end in time")
    if isinstance(load, Replay) and num_requests is not None and num_requests > len(load.times_s):
        raise ConfigError(
            f"--requests must be at most {len(load.times_s)}, the length of the trace, got {num_requests}"
        )
    return Extent(num_requests, duration_s)


def _describe(source: LengthSource) -> str:
    if isinstance(source, Lengths):
        return str(source)
    return f"trace of {len(source)}, mean {sum(source) / len(source):.6g}"
