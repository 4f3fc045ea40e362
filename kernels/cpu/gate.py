"""The rule of a gate, as the module knows it."""

from __future__ import annotations

from functools import cache
from typing import Any

from moestro.kernels.cpu.build import load
from moestro.kernels.gate import GateSpec, GroupSpec, Score

_ALL_EXPERTS = GroupSpec(num_groups=1, top_k=1)


@cache
def cpu_gate(spec: GateSpec) -> Any:
    """Raises ValueError for groups that do not fit the experts."""
    groups = spec.groups or _ALL_EXPERTS
    return load().Gate(
        spec.num_experts,
        spec.top_k,
        spec.score is Score.SIGMOID,
        groups.num_groups,
        groups.top_k,
        spec.renormalize,
        spec.scaling,
    )
