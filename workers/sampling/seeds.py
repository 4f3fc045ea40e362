"""Seeds as plain integers, for those who draw nothing themselves: the edge gives each choice its own.

SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
"""

from __future__ import annotations

GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the increment of SplitMix64
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_CHOICE = 0xD1B54A32D192ED03  # keeps the seeds of choices apart from the keys of positions
MASK_64 = (1 << 64) - 1


def derive_seed(seed: int, choice: int) -> int:
    """The seed of choice number ``choice`` (from 0) of a request with ``seed``; choice 0 keeps the seed itself.

    Both are unsigned 64 bit. Choices from 1 on are all different from each other, since the mixer is a bijection.
    """
    if not 0 <= seed <= MASK_64:
        raise ValueError(f"seed must be in [0, 2**64), not {seed}")
    if choice < 0:
        raise ValueError(f"choice must be at least 0, not {choice}")
    if choice == 0:
        return seed
    return mix64((mix64((seed ^ _CHOICE) & MASK_64) + choice * GAMMA) & MASK_64)


def mix64(value: int) -> int:
    """The finalizer of SplitMix64 on one unsigned 64-bit integer."""
    value = ((value ^ (value >> 30)) * MIX_1) & MASK_64
    value = ((value ^ (value >> 27)) * MIX_2) & MASK_64
    return value ^ (value >> 31)
