"""Many seeds in parallel processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one seed; ``failure`` is empty when everything held."""

    seed: int
    failure: str = ""


def sweep(seeds: Iterable[int], processes: int) -> Iterator[Outcome]:
    """Every seed's outcome, in order."""
    if processes == 1:
        yield from map(try_seed, seeds)
        return
    context = multiprocessing.get_context("forkserver")  # forking a process that has imported torch may hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(try_seed, seeds, chunksize=16)


def try_seed(seed: int) -> Outcome:
    """Runs one seed and says what did not hold."""
    from moestro.cluster.simulation.run import simulate

    try:
        simulate(seed)
    except Exception as error:
        return Outcome(seed, f"{type(error).__name__}: {error}")
    return Outcome(seed)
