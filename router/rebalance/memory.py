"""Layers whose last move did not pay."""

from __future__ import annotations

from dataclasses import dataclass, field

DOUBLINGS = 6


@dataclass(frozen=True, slots=True)
class Regret:
    rate: float  # seconds saved per second that had been predicted
    until: float
    backoff_s: float


@dataclass(slots=True)
class Memory:
    """Backoff that doubles with every disappointment of a layer and is forgotten when one of its moves has paid."""

    backoff_s: float
    _regrets: dict[int, Regret] = field(default_factory=dict)

    def disappointed(self, layer: int, rate: float, now: float) -> None:
        past = self._regrets.get(layer)
        backoff_s = self.backoff_s if past is None else min(2 * past.backoff_s, self.backoff_s * 2**DOUBLINGS)
        self._regrets[layer] = Regret(rate, now + backoff_s, backoff_s)

    def paid(self, layer: int) -> None:
        self._regrets.pop(layer, None)

    def forbids(self, layer: int, rate: float, now: float) -> bool:
        """Whether a layer that promises ``rate`` is to be left alone: until its backoff has passed, unless twice as
        much is promised as what disappointed."""
        regret = self._regrets.get(layer)
        return regret is not None and now < regret.until and rate < 2 * regret.rate
