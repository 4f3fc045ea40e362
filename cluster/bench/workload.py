"""What is asked of the server: requests that depend only on the seed and their number."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.cluster.bench.lengths import Lengths
from moestro.cluster.bench.seeds import Stream, generator
from moestro.protos.errors import ConfigError

LengthSource = Lengths | tuple[int, ...]  # drawn, or those of a trace in its order (from the start again at its end)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request. ``prompt`` is text or token ids; how many tokens a text is, only the server knows (None)."""

    index: int
    prompt: str | tuple[int, ...]
    input_tokens: int | None
    output_tokens: int  # max_tokens; also the exact number when ignore_eos
    ignore_eos: bool
    temperature: float
    seed: int  # of the server's sampling


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Token ids, each drawn evenly from the vocabulary: no two prompts share a prefix worth caching."""

    lengths: LengthSource
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Lines of text in an order shuffled by the seed; none comes again before all have come."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """An endless, indexable sequence of requests."""

    seed: int
    prompts: RandomPrompts | TextPrompts
    output: LengthSource
    ignore_eos: bool = True
    temperature: float = 0.0

    def request(self, index: int) -> BenchRequest:
        """Request number ``index``; the same for the same workload, whatever was asked before."""
        prompt = self._prompt(index)
        return BenchRequest(
            index=index,
            prompt=prompt,
            input_tokens=None if isinstance(prompt, str) else len(prompt),
            output_tokens=_length(self.output, self.seed, Stream.OUTPUT_LENGTH, index),
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            seed=int(generator(self.seed, Stream.SAMPLING, index).integers(2**63)),
        )

    def _prompt(self, index: int) -> str | tuple[int, ...]:
        match self.prompts:
            case TextPrompts(lines):
                cycle, position = divmod(index, len(lines))
                order = generator(self.seed, Stream.LINE_ORDER, cycle).permutation(len(lines))
                return lines[int(order[position])]
            case RandomPrompts(lengths, vocab_size):
                length = _length(lengths, self.seed, Stream.INPUT_LENGTH, index)
                ids = generator(self.seed, Stream.PROMPT, index).integers(vocab_size, size=length)
                return tuple(ids.tolist())


def check_context(requests: tuple[BenchRequest, ...], max_context: int) -> None:
    """Raises ConfigError when a request cannot fit the model's context (in tokens): the server would refuse it, and a
    benchmark must not shorten it in silence."""
    for request in requests:
        if request.input_tokens is not None and request.input_tokens + request.output_tokens > max_context:
            raise ConfigError(
                f"--input and --output must fit the model's context of {max_context} tokens together, got "
                f"{request.input_tokens} + {request.output_tokens} in request {request.index}; a max in the "
                "distribution bounds it"
            )


def sample_lengths(lengths: LengthSource, count: int, seed: int) -> tuple[int, ...]:
    """The output lengths in tokens of the first ``count`` requests of a workload with this seed."""
    return tuple(_length(lengths, seed, Stream.OUTPUT_LENGTH, index) for index in range(count))


def _length(source: LengthSource, seed: int, stream: Stream, index: int) -> int:
    if isinstance(source, tuple):
        return source[index % len(source)]
    return int(source.sample(generator(seed, stream, index), 1)[0])
