"""How a rebalancer weighs gain against cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """Times in seconds. Raises ValueError naming the field, its bound and the value."""

    enabled: bool = True
    """Decides by itself from the start; otherwise only once ``resume`` is called. Operators' requests work anyhow."""
    window_s: float = 20.0
    """Traffic that a decision looks at. Longer: fewer rows decide by chance, but a shift of traffic is seen later. A
    plan is then tried on half as much of traffic that it has not seen."""
    interval_s: float = 20.0
    """Between the end of one decision and the next. Each costs at most one run of the solver in the background; these
    become rarer, down to every eighth, while they find nothing worth it and no more than twice as much is to be gained.
    """
    horizon_s: float = 600.0
    """How long a new placement is trusted to keep paying. Longer: costlier moves are made."""
    bytes_per_s: float = 256e6
    """Weights that a rank may load while it serves. Less: gentler to the step time, and slower to adapt."""
    min_gain: float = 0.02
    """Fraction of the step time below which a plan is not worth having and a measured loss is called noise."""
    settle_s: float = 10.0
    """Traffic after a plan's last switch on which its realised gain is measured."""
    backoff_s: float = 120.0
    """How long a layer whose move did not pay is left alone; doubles every time, up to 64 times this."""
    load_slowdown: float = 0.1
    """Until measured: the fraction by which steps are slower while weights are loaded at ``bytes_per_s``."""
    switch_stall_s: float = 0.005
    """Until measured: how long the step waits when one layer switches."""

    def __post_init__(self) -> None:
        for name in ("window_s", "interval_s", "horizon_s", "bytes_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        for name in ("min_gain", "settle_s", "backoff_s", "load_slowdown", "switch_stall_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.min_gain >= 1:
            raise ValueError(f"min_gain must be below 1, got {self.min_gain}")

    @property
    def slowdown_s_per_byte(self) -> float:
        """Until measured: seconds of step time lost for every byte that a rank loads."""
        return self.load_slowdown / self.bytes_per_s
