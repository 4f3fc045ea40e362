"""Where randomness comes from: independent streams that depend only on (seed, stream, index).

numpy's ``SeedSequence`` with a spawn key keeps the streams independent, so request 17 is the same whether or not
request 16 was ever made, and another distribution of prompt lengths leaves output lengths and arrivals as they were.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """One number a purpose; changing one changes every workload ever recorded."""

    ROUND = 0
    ARRIVAL = 1
    INPUT_LENGTH = 2
    OUTPUT_LENGTH = 3
    PROMPT = 4
    SAMPLING = 5
    LINE_ORDER = 6


def generator(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    """The generator of one purpose and index."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))


def round_seed(seed: int, index: int) -> int:
    """The seed of a round. Round 0 uses ``seed`` itself, so that any round can be repeated alone from the seed that
    its report names."""
    if index == 0:
        return seed
    sequence = np.random.SeedSequence(seed, spawn_key=(Stream.ROUND, index))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
