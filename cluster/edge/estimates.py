"""What a gateway learns from the requests that end: how much they really write, and how fast they are served.

Moving averages of what was measured, weighted so that about the last ``MEMORY`` requests count. Sans-IO; times are
seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

MEMORY = 64  # requests; more: calmer, slower to follow
UNKNOWN_TOKENS = 512  # of a sequence whose like has not been seen
_KEEP = 1 - 1 / MEMORY


@dataclass(slots=True)
class WeightedMean:
    """An exponentially forgetting mean; exact from the first sample on."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total = self.total * _KEEP + value * weight
        self.weight = self.weight * _KEEP + weight

    @property
    def value(self) -> float | None:
        """None before the first sample."""
        return self.total / self.weight if self.weight else None


class OutputEstimate:
    """How many tokens a sequence will write, given how many it was allowed to: the mean share that others made of an
    allowance of the same size (a power of two). Of one that nobody has used yet ``UNKNOWN_TOKENS`` at most are
    expected: many ask for all that is left of a long context and write a paragraph, and a rank that turns out too full
    preempts, while one that is kept empty serves nobody."""

    def __init__(self) -> None:
        self._share: dict[int, WeightedMean] = {}  # by the allowance's bit length: at most some thirty

    def expected(self, max_tokens: int) -> int:
        mean = self._share.get(max_tokens.bit_length())
        share = None if mean is None else mean.value
        return min(max_tokens, UNKNOWN_TOKENS) if share is None else max(1, round(max_tokens * share))

    def learn(self, max_tokens: int, written: float) -> None:
        mean = self._share.setdefault(max_tokens.bit_length(), WeightedMean())
        mean.add(min(1.0, written / max_tokens))


class Pace:
    """How fast requests are served once they are started."""

    def __init__(self) -> None:
        self._first_s = WeightedMean()  # from start to first token
        self._token_s = WeightedMean()  # between tokens
        self._service_s = WeightedMean()  # from start to end, weighted by cost
        self._cost = WeightedMean()

    def learn(self, cost: int, service_s: float, first_s: float | None, tokens_after_first: float) -> None:
        """A request of ``cost`` tokens ended ``service_s`` after its start, its first token came after ``first_s``
        (None: never) and so many more did for each of its choices."""
        self._service_s.add(service_s, cost)
        self._cost.add(cost)
        if first_s is not None:
            self._first_s.add(first_s)
            if tokens_after_first:
                self._token_s.add((service_s - first_s) / tokens_after_first, tokens_after_first)

    @property
    def typical_cost(self) -> int:
        """Tokens of a request; 1 while nothing is known."""
        return round(self._cost.value or 1)

    def needed_s(self, output_tokens: int) -> float:
        """From start to end of a request that writes so many tokens; 0 while nothing is known."""
        return (self._first_s.value or 0.0) + (output_tokens - 1) * (self._token_s.value or 0.0)

    def seconds_to_free(self, tokens: int, open_tokens: int) -> float:
        """Until requests of so many tokens have ended, when requests of ``open_tokens`` run at any time: those spend
        the mean service time here, so their rate is the ratio of the two (J. Little 1961: L = λ W). 0 while nothing is
        known."""
        return tokens * (self._service_s.value or 0.0) / max(1, open_tokens)


class Histogram:
    """How many values were at most each bound, as Prometheus counts."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)  # in each interval

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """At most each bound; the last: all."""
        return list(accumulate(self._counts))
