"""How an engine is driven and timed, the same for all: a batch at once, or requests that arrive by themselves.

Standard library only: it runs in the environments of the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from benchmarks.peers.engines.port import PeerEngine

Clock = Callable[[], float]


class Request(TypedDict):
    """``arrival_s`` seconds after the start of the load."""

    arrival_s: float
    prompt: list[int]
    num_output: int


class Batch(TypedDict):
    """Prefill ends when every sequence has its first token; ``num_decoded`` tokens came after that, in ``decode_s``."""

    prefill_s: float
    decode_s: float
    num_decoded: int
    tokens: list[list[int]]


class Load(TypedDict):
    """Seconds from a request's arrival to its first and last token; ``total_s`` from the start to the last token."""

    ttft_s: list[float]
    end_to_end_s: list[float]
    total_s: float


@dataclass(slots=True)
class Progress:
    """What each sequence has got, and when."""

    clock: Clock
    num_outputs: Mapping[int, int]
    tokens: dict[int, list[int]]
    emissions: list[tuple[float, int]]  # time, number of tokens
    first_s: dict[int, float]
    last_s: dict[int, float]

    @classmethod
    def start(cls, clock: Clock, num_outputs: Mapping[int, int]) -> Progress:
        return cls(clock, num_outputs, {number: [] for number in num_outputs}, [], {}, {})

    def emit(self, new: Mapping[int, Sequence[int]]) -> None:
        now = self.clock()
        for number, tokens in new.items():
            if tokens:
                self.first_s.setdefault(number, now)
                self.tokens[number].extend(tokens)
                if len(self.tokens[number]) >= self.num_outputs[number]:
                    self.last_s[number] = now
        self.emissions.append((now, sum(map(len, new.values()))))

    @property
    def num_ended(self) -> int:
        return len(self.last_s)

    def checked(self) -> list[list[int]]:
        """All tokens by number. Raises RuntimeError if a sequence has other than what was asked of it."""
        for number, num_output in self.num_outputs.items():
            if len(self.tokens[number]) != num_output:
                raise RuntimeError(f"sequence {number}: asked for {num_output} tokens, got {len(self.tokens[number])}")
        return [self.tokens[number] for number in sorted(self.tokens)]


def run_batch(
    engine: PeerEngine, prompts: Sequence[Sequence[int]], num_output: int, clock: Clock = time.perf_counter
) -> Batch:
    """All prompts at once, at least 2 tokens each. The engine is idle before and after."""
    start = clock()
    progress = Progress.start(clock, dict.fromkeys(range(len(prompts)), num_output))
    for number, prompt in enumerate(prompts):
        engine.add(number, prompt, num_output)
    while progress.num_ended < len(prompts):
        engine.step(progress.emit)
    tokens = progress.checked()
    first, last = max(progress.first_s.values()), max(progress.last_s.values())
    num_decoded = sum(count for moment, count in progress.emissions if moment > first)
    return {"prefill_s": first - start, "decode_s": last - first, "num_decoded": num_decoded, "tokens": tokens}


def run_load(
    engine: PeerEngine,
    requests: Sequence[Request],
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Load:
    """Each request is added when it is due, or after the step that was running then, whatever the engine does: TTFT is
    counted from when it was due, so time spent waiting for that step is in it."""
    start = clock()
    progress = Progress.start(clock, {number: request["num_output"] for number, request in enumerate(requests)})
    num_added = 0
    while progress.num_ended < len(requests):
        while num_added < len(requests) and requests[num_added]["arrival_s"] <= clock() - start:
            request = requests[num_added]
            engine.add(num_added, request["prompt"], request["num_output"])
            num_added += 1
        if num_added > progress.num_ended:
            engine.step(progress.emit)
        else:
            sleep(max(0.0, requests[num_added]["arrival_s"] - (clock() - start)))
    progress.checked()
    due = [start + request["arrival_s"] for request in requests]
    return {
        "ttft_s": [progress.first_s[number] - due[number] for number in range(len(requests))],
        "end_to_end_s": [progress.last_s[number] - due[number] for number in range(len(requests))],
        "total_s": max(progress.last_s.values()) - start,
    }
