"""What a rebalancer is told and what it asks for.

Legend: L mixture layers, E logical experts, R ranks, C slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moestro.router.placement import Placement

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Solve = Callable[[Ints, tuple[Placement, ...], tuple[float, ...]], tuple[Placement, ...]]
"""(loads_LE, previous, slowness by rank) -> placements. Must be a pure function: every rank calls it, and all must get
the same."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What all ranks did since the last observation, gathered so that it is the same on every rank.

    Rows are those of the placements active throughout: a switch comes directly after an observation.
    """

    now: float  # seconds; any clock that never runs backwards, one for all ranks
    steps: int
    rows_LRC: Ints  # rows computed by every slot
    tokens_R: Ints  # tokens that each rank put through the model
    steps_s_R: Floats  # seconds of steps: neither sleep nor switches
    experts_s_R: Floats  # of these, seconds in expert computation
    waiting_s_R: Floats  # of these, seconds blocked in dispatch and combine
    loaded_bytes_R: Ints  # weights loaded in the background
    switch_s_R: Floats  # seconds that switches of layers held up the step

    def __post_init__(self) -> None:
        ranks = self.rows_LRC.shape[1]
        for field in fields(self):
            if field.name.endswith("_R"):
                value_R = getattr(self, field.name)
                if value_R.shape != (ranks,):
                    raise ValueError(f"{field.name} must have shape ({ranks},), got {value_R.shape}")
                if not np.all(np.isfinite(value_R)) or np.any(value_R < 0):
                    raise ValueError(f"{field.name} must be finite and at least 0, got {value_R.tolist()}")


@dataclass(frozen=True, slots=True, eq=False)
class StartSolve:
    """Call the solver on another thread; answer ``solved(ticket, ...)`` once every rank has."""

    ticket: int
    loads_LE: Ints  # rows by logical expert in the window; not to be written to
    previous: tuple[Placement, ...]
    slowness: tuple[float, ...]  # by rank


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Stage what ``placement`` newly puts into this rank's slots of ``layer``, on another thread, at no more than
    ``bytes_per_s``; answer ``ready(ticket)`` once every rank has."""

    ticket: int
    layer: int
    placement: Placement
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Switch:
    """Before the next step: put what was staged for ``ticket`` in its slots and serve ``layer`` by ``placement``."""

    ticket: int
    layer: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget this solve or load, staged weights included. An answer that is already on its way does no harm."""

    ticket: int


Intent = StartSolve | StartLoad | Switch | Drop
