"""A runner whose steps are believed only while the group stands.

On CUDA a step is waited for on the device. When its collectives are aborted, since a peer is gone or a newer view has
come, the device goes on, and what it returns is nothing that anybody computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moestro.workers.kv_cache import KVCache
from moestro.workers.runner import Launched, StepResult, StepRunner
from moestro.workers.scheduler_sequence import StepPlan


@dataclass(frozen=True, slots=True)
class WatchedRunner:
    """``check`` raises GroupBroken when the group no longer stands."""

    runner: StepRunner
    check: Callable[[], None]

    @property
    def cache(self) -> KVCache:
        return self.runner.cache

    def launch(self, plan: StepPlan, num_tokens_N: tuple[int, ...]) -> Launched:
        return _Watched(self.runner.launch(plan, num_tokens_N), self.check)


@dataclass(frozen=True, slots=True)
class _Watched:
    launched: Launched
    check: Callable[[], None]

    def collect(self) -> StepResult:
        result = self.launched.collect()
        self.check()
        return result
