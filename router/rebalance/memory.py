"""What did not pay lately, and for how long not to try it again."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Regret:
    rate: float  # that had been promised
    until: float
    backoff_s: float


@dataclass(slots=True)
class Memory:
    """Backoff that doubles with every disappointment of a subject (a layer) and is forgotten once it has paid."""

    backoff_s: float
    doublings: int
    _regrets: dict[int, Regret] = field(default_factory=dict)

    def disappointed(self, subject: int, rate: float, now: float) -> None:
        past = self._regrets.get(subject)
        backoff_s = self.backoff_s if past is None else min(2 * past.backoff_s, self.backoff_s * 2**self.doublings)
        self._regrets[subject] = Regret(rate, now + backoff_s, backoff_s)

    def paid(self, subject: int) -> None:
        self._regrets.pop(subject, None)

    def forbids(self, subject: int, rate: float, now: float) -> bool:
        """Whether a subject that promises ``rate`` is to be left alone: until its backoff has passed, unless twice as
        much is promised as what disappointed."""
        regret = self._regrets.get(subject)
        return regret is not None and now < regret.until and rate < 2 * regret.rate
