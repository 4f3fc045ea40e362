"""A rank of a group at full strength that never changes: of a process alone, of tests and of measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moestro.protos.errors import ConfigError
from moestro.protos.sequences import EngineLimits, EngineLoad
from moestro.router.mesh import StoreAddress
from moestro.router.view import Member, View
from moestro.workers.loading import OnProgress
from moestro.workers.rank_setup import RankSpec
from moestro.workers.worker import Worker

_PATIENT_S = 60.0  # nobody would form the group again
_NO_STORE = StoreAddress("", 0)  # nobody to meet


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """One rank's place in its group, and where the group's members meet. Groups on one store have different epochs."""

    rank: int
    epoch: int
    store: StoreAddress
    hostname: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """A rank that is ready to run."""

    loop: Worker
    limits: EngineLimits
    load: EngineLoad  # before anything runs
    device: str


def build_rank(spec: RankSpec, place: GroupPlace | None = None, on_progress: OnProgress | None = None) -> BuiltRank:
    """Loads one rank; without a place it is alone. It meets the others when it runs, which fails when it breaks.

    Raises CheckpointError, and ConfigError when the checkpoint, the shape and the KV pool do not fit together."""
    if place is None:
        if spec.shape.world_size != 1:
            raise ConfigError(f"a rank alone has dp 1 and tp 1, not {spec.shape.dp} and {spec.shape.tp}")
        place = GroupPlace(0, 0, _NO_STORE)
    patient = replace(spec, watchdog_s=spec.watchdog_s or _PATIENT_S)
    worker = Worker(patient, place.store, place.rank, place.rank, hostname=place.hostname, on_progress=on_progress)
    loaded = worker.load()
    everyone = tuple(Member(rank, rank) for rank in range(spec.shape.world_size))
    worker.form(View(place.epoch + 1, everyone, spec.shape.tp))
    return BuiltRank(worker, loaded.limits, loaded.load, loaded.device)
