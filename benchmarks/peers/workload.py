"""What a round asks of every engine: the same for all, another in each round, by seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from benchmarks.peers.driving import Request

from moestro.cluster.bench.arrivals import Extent, OpenLoop, arrival_times

T = TypeVar("T")

VOCABULARY = 8192
PROMPT = (120, 137)  # tokens, from and below: 128 on average
OUTPUT = (40, 57)  # 48
LOAD_PROMPT = (96, 161)  # each request of a load has its own lengths
LOAD_OUTPUT = (24, 73)
_LOAD = 1 << 20  # apart from every batch size
MAX_LENGTH = 256  # no request is longer, prompt and output together


@dataclass(frozen=True, slots=True)
class BatchWork:
    """Sequences of equal lengths, so that an engine without continuous batching needs no padding."""

    prompts: list[list[int]]
    num_output: int


def batch_work(seed: int, number: int, batch: int) -> BatchWork:
    """Round ``number`` at batch size ``batch``."""
    rng = np.random.default_rng([seed, number, batch])
    length, num_output = rng.integers(*PROMPT), rng.integers(*OUTPUT)
    return BatchWork(rng.integers(VOCABULARY, size=(batch, length)).tolist(), int(num_output))


def load_work(seed: int, number: int, rate: float, count: int) -> list[Request]:
    """``count`` requests with Poisson arrivals at ``rate`` a second. A smaller count is a prefix of a larger one."""
    arrivals = arrival_times(OpenLoop(rate), Extent(num_requests=count), seed * 1_000 + number)
    requests: list[Request] = []
    for index, arrival in enumerate(arrivals):
        rng = np.random.default_rng([seed, number, index, _LOAD])
        prompt = rng.integers(VOCABULARY, size=rng.integers(*LOAD_PROMPT)).tolist()
        requests.append({"arrival_s": arrival, "prompt": prompt, "num_output": int(rng.integers(*LOAD_OUTPUT))})
    return requests


def rotated(names: Sequence[T], number: int) -> list[T]:
    """The order of turns in round ``number``: everyone is first equally often, and follows the same neighbour."""
    start = number % len(names) if names else 0
    return [*names[start:], *names[:start]]
