"""The service level objective that goodput is counted against: ``ttft=500ms,tpot=50ms,e2e=10s``."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.cluster.bench import options
from moestro.protos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in seconds, inclusive; None: no bound. A request is good when it completed within all of them."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """Whether a completed request is good. One of a single token has no TPOT and cannot miss it."""
        pairs = ((ttft_s, self.ttft_s), (tpot_s, self.tpot_s), (e2e_s, self.e2e_s))
        return all(value is None or bound is None or value <= bound for value, bound in pairs)

    def __str__(self) -> str:
        bounds = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        return ",".join(f"{name}={value * 1e3:g}ms" for name, value in bounds.items() if value is not None)


def parse_slo(option: str, text: str) -> Slo:
    """``name=duration`` pairs of ttft, tpot and e2e. Raises ConfigError."""
    given = options.assignments(option, text)
    for name in given:
        if name not in ("ttft", "tpot", "e2e"):
            raise ConfigError(f"{option} must bound ttft, tpot or e2e, got {name!r} in {text!r}")
    return Slo(**{f"{name}_s": options.seconds(f"{option} {name}", value) for name, value in given.items()})
