"""What a worker tells its group's supervisor about itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkerPhase(Enum):
    """Where a worker is. ``loading -> ready -> joining -> serving``; from joining and serving it may come to broken,
    and from there a newer view takes it to joining again."""

    LOADING = "loading"
    READY = "ready"  # loaded; waits for its first view
    JOINING = "joining"
    SERVING = "serving"
    BROKEN = "broken"  # its view's collectives no longer work; state and KV cache are intact
    STOPPED = "stopped"  # asked to
    FAILED = "failed"  # of its own fault, for good; ``reason`` says why


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A snapshot, replaced whole; read by any thread. Seconds are of this process's monotonic clock."""

    phase: WorkerPhase
    epoch: int = 0  # of the view it is in, joins or has lost; 0 for none yet
    reason: str = ""  # of BROKEN and FAILED, in a sentence
    turns: int = 0  # of the engine's loop, since the start
    progress: int = 0  # grows with every collective the worker has come to in this epoch: who hangs has the least
    in_step_since_s: float | None = None  # when the turn that now runs began; None between turns and asleep
    lost_sequences: int = 0  # given up because a tensor-parallel set could not agree, since the start
    spare_ranks: int = 0  # that the group of this epoch can lose before those left cannot hold all experts
