"""``python -m moestro.cluster.simulation``: one seed with its log, or many in parallel processes.

--seed 17 --trace      replay one, and print what happened
--seeds 10000          sweep; prints each seed that fails, exit code 1 if any does
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from moestro.cluster.simulation.sweep import sweep


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moestro.cluster.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--trace", action="store_true", help="print its log")
    parser.add_argument("--seeds", type=int, default=100, help="run so many")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        return run_one(options.seed, options.trace)
    return run_many(range(options.first, options.first + options.seeds), options.processes)


def run_one(seed: int, shows_trace: bool) -> int:
    from moestro.cluster.simulation.run import SimulationFailed, simulate

    try:
        trace, failure = simulate(seed), None
    except SimulationFailed as failed:
        trace, failure = failed.trace, failed
    if shows_trace:
        print("\n".join(trace.lines()))
    print(f"seed {seed}: {failure or 'everything held'} ({len(trace.events)} events, digest {trace.digest()})")
    return 1 if failure else 0


def run_many(seeds: range, processes: int) -> int:
    started_s, num_failed = time.perf_counter(), 0
    for done, outcome in enumerate(sweep(seeds, processes), start=1):
        if outcome.failure:
            num_failed += 1
            print(f"seed {outcome.seed}: {outcome.failure}", flush=True)
        if done % 1000 == 0:
            print(f"{done} of {len(seeds)} seeds in {time.perf_counter() - started_s:.0f} s", flush=True)
    print(f"{len(seeds)} seeds, {num_failed} failed, {time.perf_counter() - started_s:.0f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
