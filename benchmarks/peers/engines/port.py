"""What an engine under test must offer. Nothing here or beside it may import more than the standard library and that
engine: each runs in its own environment, where neither Moestro nor the other peers are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Emit = Callable[[Mapping[int, Sequence[int]]], None]  # new tokens of each sequence, as they come


@dataclass(frozen=True, slots=True)
class Settings:
    """What every engine is started with. Lengths in tokens."""

    model: str  # a Hugging Face folder
    threads: int
    max_sequences: int
    max_length: int  # of one sequence, prompt and output together
    cache_bytes: int  # of keys and values: room for all of them, with a little to spare


class PeerEngine(Protocol):
    """Greedy decoding of token ids in bf16. The end-of-sequence token does not end a sequence."""

    def add(self, number: int, prompt: Sequence[int], num_output: int) -> None:
        """Queues sequence ``number``, which is not in use."""

    def step(self, emit: Emit) -> None:
        """Some work on what was added; calls ``emit`` once for each set of tokens that became known together."""
