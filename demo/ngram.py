"""Interpolated modified Kneser-Ney n-gram model over token ids: the baseline a trained model has to beat.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3.
An n-gram is packed into one uint64, so all counts are sorted arrays and all look-ups are binary searches.

Legend: N tokens, G distinct n-grams of one order, C distinct contexts of one order.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """Counts of one order: raw for the highest order, distinct left neighbours for the lower ones."""

    grams_G: Keys
    counts_G: npt.NDArray[np.int64]
    contexts_C: Keys
    context_totals_C: Floats
    backoff_mass_C: Floats
    discounts: tuple[float, float, float, float]


@dataclass(frozen=True)
class KneserNey:
    """A fitted model: one level per order, lowest order first."""

    levels: tuple[Level, ...]
    bits: int
    vocab_size: int

    @property
    def order(self) -> int:
        return len(self.levels)

    def log_probs(self, tokens_N: npt.NDArray[np.integer]) -> Floats:
        """Natural-log probability of each token given those before it in the same array."""
        prob_N = np.full(len(tokens_N), 1.0 / self.vocab_size)
        for order, level in enumerate(self.levels, start=1):
            # The first order - 1 tokens have no context of this length and keep the lower order's estimate.
            if len(tokens_N) < order:
                break
            keys = pack(tokens_N, order, self.bits)
            context_at = _find(level.contexts_C, keys >> np.uint64(self.bits))
            known = context_at >= 0
            gram_at = _find(level.grams_G, keys)
            counts = np.where(gram_at >= 0, level.counts_G[gram_at], 0)
            discounted = np.maximum(counts - np.asarray(level.discounts)[np.minimum(counts, 3)], 0.0)
            lower = prob_N[order - 1 :]
            mixed = discounted / level.context_totals_C[context_at] + level.backoff_mass_C[context_at] * lower
            prob_N[order - 1 :] = np.where(known, mixed, lower)
        log_prob_N: Floats = np.log(prob_N)
        return log_prob_N


def pack(tokens_N: npt.NDArray[np.integer], order: int, bits: int) -> Keys:
    """All n-grams of a token array, [N - order + 1], the last token in the low bits."""
    length = len(tokens_N) - order + 1
    keys = np.zeros(length, dtype=np.uint64)
    for place in range(order):
        keys = (keys << np.uint64(bits)) | tokens_N[place : place + length].astype(np.uint64)
    return keys


def _find(sorted_keys: Keys, wanted: Keys) -> npt.NDArray[np.int64]:
    """Index of each wanted key, or -1."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == wanted, at, -1)


def _level(grams: Keys, counts: npt.NDArray[np.int64], bits: int) -> Level:
    n1, n2, n3, n4 = (max(int((counts == k).sum()), 1) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = (0.0, 1 - 2 * y * n2 / n1, max(2 - 3 * y * n3 / n2, 0.0), max(3 - 4 * y * n4 / n3, 0.0))
    contexts, owner = np.unique(grams >> np.uint64(bits), return_inverse=True)
    totals = np.bincount(owner, weights=counts).astype(np.float64)
    mass = np.bincount(owner, weights=np.asarray(discounts)[np.minimum(counts, 3)])
    return Level(grams, counts, contexts, totals, mass / totals, discounts)


def fit(tokens_N: npt.NDArray[np.integer], order: int, vocab_size: int) -> KneserNey:
    """Count a token array and estimate the discounts.

    Raises:
        ValueError: when an n-gram of this order and vocabulary does not fit into 64 bits.
    """
    bits = max(1, (vocab_size - 1).bit_length())
    if order * bits > 64:
        raise ValueError(f"order * bits per token must be <= 64, got {order} * {bits}")
    levels: list[Level] = []
    grams, counts = np.unique(pack(tokens_N, order, bits), return_counts=True)
    for lower in range(order, 0, -1):
        levels.append(_level(grams, counts, bits))
        if lower > 1:
            # Stripping the oldest token of each distinct n-gram counts its distinct left neighbours.
            mask = np.uint64((1 << (bits * (lower - 1))) - 1)
            grams, counts = np.unique(grams & mask, return_counts=True)
    return KneserNey(tuple(reversed(levels)), bits, vocab_size)
