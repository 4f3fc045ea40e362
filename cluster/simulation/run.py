"""One run of one seed."""

from __future__ import annotations

import logging

from moestro.cluster.simulation.cluster import SimulatedCluster
from moestro.cluster.simulation.scenario import Scenario, draw_scenario
from moestro.cluster.simulation.trace import Trace
from moestro.cluster.simulation.virtual_time import run_virtual


class SimulationFailed(AssertionError):
    """An invariant does not hold; the message says which, and how to see it again."""

    def __init__(self, seed: int, reason: str, trace: Trace) -> None:
        self.trace = trace
        super().__init__(f"{reason} [replay: python -m moestro.cluster.simulation --seed {seed} --trace]")


class _ToTrace(logging.Handler):
    """What the real code logs, between what the simulation notes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        self._trace(record.name.removeprefix("moestro.cluster."), "{} {}", record.levelname, record.getMessage())


def simulate(seed: int, scenario: Scenario | None = None) -> Trace:
    """Runs a seed's scenario, or another one with that seed's chance. Raises SimulationFailed."""
    trace = Trace()
    logger, handler = logging.getLogger("moestro"), _ToTrace(trace)
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)

    async def run() -> None:
        await SimulatedCluster(scenario or draw_scenario(seed), trace).run()

    try:
        run_virtual(run())
    except Exception as error:
        raise SimulationFailed(seed, f"{type(error).__name__}: {error}", trace) from error
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
    return trace
